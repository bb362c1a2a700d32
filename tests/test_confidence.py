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
