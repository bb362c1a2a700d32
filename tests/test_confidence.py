"""Confidence scores and risk–coverage curves against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from hf_softheads.measure import confidence


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(40, 12, generator=torch.Generator().manual_seed(0))


def test_scores_by_their_formulas(logits: torch.Tensor) -> None:
    scores = {
        "msp": confidence.msp(logits),
        "cooler": confidence.msp(logits, 0.5),
        "max": confidence.max_logit(logits),
        "energy": confidence.energy(logits, 2.0),
        "norm": confidence.p_norm(logits, 3.0),
    }
    for i, row in enumerate(logits.tolist()):
        top = max(row)
        assert float(scores["msp"][i]) == pytest.approx(
            math.exp(top) / sum(map(math.exp, row)), rel=1e-4
        )
        cooler = math.exp(2 * top) / sum(math.exp(2 * z) for z in row)
        assert float(scores["cooler"][i]) == pytest.approx(cooler, rel=1e-4)
        assert float(scores["max"][i]) == pytest.approx(top)
        energy = 2 * math.log(sum(math.exp(z / 2) for z in row))
        assert float(scores["energy"][i]) == pytest.approx(energy, rel=1e-4)
        mean = sum(row) / 12
        norm = sum(abs(z - mean) ** 3 for z in row) ** (1 / 3)
        assert float(scores["norm"][i]) == pytest.approx((top - mean) / norm, rel=1e-4)


def test_p_norm_ignores_scale_and_shift_and_survives_large_powers(logits: torch.Tensor) -> None:
    plain = confidence.p_norm(logits, 4)
    torch.testing.assert_close(confidence.p_norm(100 * logits + 7, 4), plain, rtol=1e-3, atol=1e-5)
    assert confidence.p_norm(1e4 * logits, 100).isfinite().all()


def test_curve_by_hand() -> None:
    found = confidence.risk_coverage(
        torch.tensor([0.9, 0.1, 0.5, 0.7]), torch.tensor([True, False, False, True])
    )
    assert found.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert found.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert found.aurc == pytest.approx((1 / 3 + 1 / 2) / 4)
    assert found.excess == pytest.approx(0)
    assert found.at(0.75) == pytest.approx(1 / 3)
    worst = confidence.risk_coverage(
        -torch.tensor([0.9, 0.1, 0.5, 0.7]), torch.tensor([True, False, False, True])
    )
    assert worst.aurc == pytest.approx((1 + 1 + 2 / 3 + 1 / 2) / 4)
    assert worst.best == found.best


def test_equal_confidences_do_not_depend_on_their_order() -> None:
    right = torch.rand(50, generator=torch.Generator().manual_seed(1)) < 0.5
    same = confidence.risk_coverage(torch.zeros(50), right)
    torch.testing.assert_close(same.risk, (1 - right.double().mean()).expand(50))


def test_losses_instead_of_mistakes() -> None:
    loss = torch.tensor([3.0, 1.0, 2.0])
    found = confidence.risk_coverage(-loss, loss)
    assert found.risk.tolist() == pytest.approx([1, 1.5, 2])


def test_best_setting_has_the_least_area(logits: torch.Tensor) -> None:
    right = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.5
    areas = {
        p: confidence.risk_coverage(confidence.p_norm(logits, p), right).aurc for p in (1, 2, 5)
    }
    best = confidence.best_setting(confidence.p_norm, logits, right, areas)
    assert best == min(areas, key=lambda p: areas[p])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: confidence.energy(z, 0.0), "temperature must be positive"),
        (lambda z: confidence.msp(z, -1.0), "temperature must be positive"),
        (lambda z: confidence.p_norm(z, 0.0), "p must be positive"),
        (lambda z: confidence.risk_coverage(z, z > 0), "two vectors of one length"),
        (lambda z: confidence.risk_coverage(z[0, :0], z[0, :0] > 0), "two vectors"),
        (lambda z: confidence.risk_coverage(z[0] * torch.nan, z[0] > 0), "NaN"),
        (lambda z: confidence.risk_coverage(z[0], z[0] > 0).at(0.0), "a coverage lies above 0"),
    ],
)
def test_wrong_input(call, message: str, logits: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(logits)


def test_margin_entropy_and_gini_by_their_formulas(logits: torch.Tensor) -> None:
    logits[0, 3] = -torch.inf
    margins, entropies, ginis = (
        score(logits).tolist() for score in (confidence.margin, confidence.entropy, confidence.gini)
    )
    for i, row in enumerate(logits.double().softmax(-1).tolist()):
        first, second = sorted(row)[-1:-3:-1]
        assert margins[i] == pytest.approx(first - second, rel=1e-4)
        assert entropies[i] == pytest.approx(sum(p * math.log(p) for p in row if p > 0), rel=1e-4)
        square = sum(p * p for p in row)
        assert ginis[i] == pytest.approx(-(1 - square) / square, rel=1e-4, abs=1e-6)


def confused() -> tuple[torch.Tensor, torch.Tensor]:
    """Answers among 6 labels: a toss-up between 0 and 1 is wrong, one between 2 and 3 right, msp is the same."""
    generator = torch.Generator().manual_seed(1)
    logits = 0.1 * torch.randn(400, 6, generator=generator)
    correct = torch.arange(400) % 2 == 0
    logits[correct, 2:4] += 4
    logits[~correct, 0:2] += 4
    return logits, correct


def test_relative_by_its_formula_and_where_msp_is_blind() -> None:
    logits, correct = confused()
    fitted = confidence.Relative.fit(logits[:200], correct[:200])
    p = logits[:200].double().softmax(-1)
    wrong, right = (
        sum(torch.outer(q, q) for q in p[which]) / which.sum()
        for which in (~correct[:200], correct[:200])
    )
    expected = ((wrong - right) / 2).relu()
    expected.fill_diagonal_(0)
    expected /= expected.norm()
    torch.testing.assert_close(fitted.matrix.double(), expected, atol=1e-5, rtol=1e-4)
    q = logits[210].double().softmax(-1)
    assert float(fitted(logits[210])) == pytest.approx(float(-q @ expected @ q), rel=1e-4)
    fresh, truth = logits[200:], correct[200:]
    ours = confidence.risk_coverage(fitted(fresh), truth)
    assert ours.excess < 0.01
    assert confidence.risk_coverage(confidence.msp(fresh), truth).excess > 0.1
    bucketed = confidence.Relative.fit(logits[:200], correct[:200], tokens=4)
    assert bucketed.matrix.shape == (5, 5)
    assert confidence.risk_coverage(bucketed(fresh), truth).excess < 0.01
    even = confidence.Relative.fit(logits[:200], correct[:200], weight=0.0)  # D would be 0
    miss = 1 - fresh.softmax(-1).square().sum(-1)
    torch.testing.assert_close(even(fresh), -miss / math.sqrt(30))


def test_trust_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    exemplars, labels = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    states, answers = torch.randn(9, 4, generator=generator), torch.arange(9) % 3
    found = confidence.trust(states, answers, exemplars, labels)
    for x, answer, score in zip(states, answers, found, strict=True):
        distance = [float((x - e).norm()) for e in exemplars]
        near = min(d for d, label in zip(distance, labels, strict=True) if label == answer)
        far = min(d for d, label in zip(distance, labels, strict=True) if label != answer)
        assert float(score) == pytest.approx(far / near, rel=1e-3)


def test_fits_refuse_what_they_cannot_use() -> None:
    logits, correct = confused()
    with pytest.raises(ValueError, match=r"weight \(λ\) must be 0 to 1, got 2"):
        confidence.Relative.fit(logits, correct, weight=2)
    with pytest.raises(ValueError, match="right answers and wrong ones"):
        confidence.Relative.fit(logits, torch.ones(400, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        confidence.Relative.fit(logits, correct.long())
    with pytest.raises(ValueError, match="one label alone"):
        confidence.trust(logits[:2], torch.zeros(2), logits, torch.zeros(400))
    with pytest.raises(ValueError, match=r"no exemplar of 1 answers such as \[7\]"):
        confidence.trust(logits[:1], torch.tensor([7]), logits, torch.arange(400) % 2)
