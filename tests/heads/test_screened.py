"""Screen and refine: agreement, calibration, composition, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_softheads.heads import (
    VQ,
    Cascade,
    Dense,
    LowRank,
    ProductVQ,
    Quantized,
    ResidualVQ,
    Screened,
    TransformCoded,
)
from hf_softheads.heads.base import HeadSpec, LogitTransform
from hf_softheads.heads.low_rank import ProjectedHead
from hf_softheads.heads.screened import ScreenedHead
from hf_softheads.registry import spec_from_dict
from tests.heads.conftest import Toy


def fitted(spec: Screened, toy: Toy, *, stats: bool = True) -> ScreenedHead:
    spec.check(*toy.shape)
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, toy.stats if stats else None)
    return head


SCREENS = [LowRank(4), Quantized(2), VQ.repaired(32), ResidualVQ(2, 16), TransformCoded(9.0, 16, 4)]


@pytest.mark.parametrize("screen", SCREENS, ids=lambda s: s.name)
def test_candidates_are_exact_and_the_rest_is_the_shifted_preview(
    screen: HeadSpec, toy: Toy
) -> None:
    head = fitted(Screened(screen, candidates=20), toy)
    hidden = toy.hidden[:512]
    dense, found = hidden @ toy.weight.T, head(hidden)
    preview = head.screen(hidden).float()
    last = preview.topk(20).values[:, -1:]  # of tokens with this preview any may be chosen
    best, tail = preview > last, preview < last
    torch.testing.assert_close(found[best], dense[best], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[tail], (preview + head.weight)[tail])


@pytest.mark.parametrize("screen", SCREENS, ids=lambda s: s.name)
def test_refining_beats_the_screen_alone(screen: HeadSpec, toy: Toy) -> None:
    head = fitted(Screened(screen, candidates=20), toy)
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)

    def kl(logits: torch.Tensor) -> float:
        return float((dense.exp() * (dense - logits.log_softmax(-1))).sum(-1).mean().detach())

    assert kl(head(toy.hidden)) < 0.7 * kl(head.screen(toy.hidden))
    top = dense.argmax(-1)
    mine = (head.topk(toy.hidden, 1)[1].squeeze(-1) == top).float().mean()
    alone = (head.screen(toy.hidden).argmax(-1) == top).float().mean()
    assert mine > alone


def test_calibration_removes_the_bias_of_log_z(toy: Toy) -> None:
    dense = (toy.hidden @ toy.weight.T).logsumexp(-1).mean()
    plain = fitted(Screened(LowRank(3), candidates=8), toy)
    calibrated = abs(float((plain.logsumexp(toy.hidden).mean() - dense).detach()))
    with torch.no_grad():
        plain.weight.zero_()
    raw = abs(float((plain.logsumexp(toy.hidden).mean() - dense).detach()))
    assert calibrated < 0.3 * raw


@pytest.mark.parametrize(
    "inner", [Quantized(8), ProductVQ(16, 16), LowRank(16)], ids=lambda s: s.name
)
def test_exact_rows_may_be_stored_compactly(inner: HeadSpec, toy: Toy) -> None:
    head = fitted(Screened(LowRank(4), candidates=256, inner=inner), toy)
    hidden = toy.hidden[:256]
    torch.testing.assert_close(head(hidden), head.inner(hidden).float(), rtol=1e-4, atol=1e-3)


def test_dense_bias_is_in_both_parts(toy: Toy) -> None:
    bias = torch.linspace(-2, 2, 256)
    spec = Screened(LowRank(16), candidates=10)
    head = spec.module(16, 256, bias=True)
    spec.fit(head, toy.weight, bias, None)
    expected = toy.hidden @ toy.weight.T + bias
    torch.testing.assert_close(head(toy.hidden), expected, rtol=1e-3, atol=1e-2)


def test_composition_in_json() -> None:
    data = {"name": "screened", "screen": {"name": "vq", "codes": 8}, "candidates": 4}
    spec = spec_from_dict("head", data)
    assert spec == Screened(VQ(8), 4, Dense())
    assert spec_from_dict("head", spec.to_dict()) == spec


def test_parts_that_stay_in_fp32(toy: Toy) -> None:
    head = fitted(Screened(VQ.repaired(8), candidates=4), toy)
    assert set(head.keep_in_fp32) == {"weight", "screen.bias"}


def test_reads_less_than_it_stores(toy: Toy) -> None:
    head = fitted(Screened(LowRank(2), candidates=8), toy)
    assert head.bytes_read < head.nbytes / 2
    assert "reads" in head.notes()[0]


@pytest.mark.parametrize("candidates", [257, 1000])
def test_refuses_impossible_candidates(candidates: int) -> None:
    with pytest.raises(ValueError, match=f"asked for {candidates} candidates; 1 to 256"):
        Screened(LowRank(4), candidates).check(16, 256)


def test_refuses_inner_heads_without_single_rows() -> None:
    with pytest.raises(ValueError, match="a vq head scores all tokens at once"):
        Screened(LowRank(4), 8, VQ(8)).check(16, 256)


def test_refuses_a_screen_of_screens() -> None:
    with pytest.raises(ValueError, match="cannot be screened itself"):
        Screened(Screened(LowRank(4), 8), 8).check(16, 256)


def test_checks_its_parts() -> None:
    with pytest.raises(ValueError, match="vq asked for 300 codes"):
        Screened(VQ(300), 8).check(16, 256)


def cascade(toy: Toy, margin: float, inner: HeadSpec | None = None):  # type: ignore[no-untyped-def]
    spec = Cascade(LowRank(4), 20, inner or Dense(), margin=margin)
    spec.check(*toy.shape)
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, toy.stats)
    return head


def rest_share(head: ScreenedHead, hidden: torch.Tensor) -> torch.Tensor:
    """Probability of the tokens that are no candidates, by the definition."""
    previews = head.screen(hidden).float() + head.weight
    best = previews.topk(20).indices
    mixed = previews.scatter(1, best, head.inner.score(hidden, best))
    return mixed.softmax(-1).scatter(1, best, 0.0).sum(-1)


@pytest.mark.parametrize("inner", [Dense(), Quantized(4)], ids=lambda s: s.name)
@torch.no_grad()
def test_states_that_lead_by_too_little_are_scored_by_all_rows(inner: HeadSpec, toy: Toy) -> None:
    head = cascade(toy, 1.0, inner)
    low = rest_share(head, toy.hidden) > 1 / (1 + torch.e)
    assert 0.02 < low.float().mean() < 0.9
    assert torch.equal(low, head.unsure(toy.hidden))
    found = head(toy.hidden)
    torch.testing.assert_close(
        found[low], head.inner(toy.hidden[low]).float(), rtol=1e-4, atol=1e-3
    )
    plain = ScreenedHead(16, 256, 20, head.screen, head.inner)
    plain.weight = head.weight
    everywhere = plain(toy.hidden)  # a product of other rows may be rounded another way
    assert torch.equal(found[~low], everywhere[~low])
    assert (found[low] - everywhere[low]).abs().amax() > 0.1
    one_by_one = torch.stack([head(h) for h in toy.hidden[:40]])
    torch.testing.assert_close(one_by_one, found[:40], rtol=1e-4, atol=1e-3)


def test_a_wider_margin_is_more_exact_and_reads_more(toy: Toy) -> None:
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)
    heads = [cascade(toy, margin) for margin in (0.0, 1.0, 3.0, 60.0)]
    with torch.no_grad():
        kls = [
            float((dense.exp() * (dense - h(toy.hidden).log_softmax(-1))).sum(-1).mean())
            for h in heads
        ]
    assert kls[0] > kls[1] > kls[2] > kls[3]
    assert kls[3] < 1e-5
    reads = [head.bytes_read for head in heads]
    assert reads[0] < reads[1] < reads[2] < reads[3] <= heads[3].nbytes
    for head in heads:
        seen = head.unsure(toy.hidden).float().mean()
        assert head.fallback == pytest.approx(float(seen), abs=0.05)
        assert f"{head.fallback:.2%}" in head.notes()[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_cascade_falls_back_too(toy: Toy) -> None:
    head = cascade(toy, 1.0)
    hidden, labels = toy.hidden[:16], toy.labels[:16]
    compiled = torch.compile(head.log_prob, backend="eager", fullgraph=True)
    found, expected = compiled(hidden, labels), head.log_prob(hidden, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_statistics_all_rows_count(toy: Toy) -> None:
    spec = Cascade(LowRank(4), 20)
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, None)
    assert head.fallback is None
    assert head.bytes_read == head.screen.nbytes + head.inner.nbytes
    assert "not known without statistics" in head.notes()[0]


@pytest.mark.parametrize("margin", [-0.1, float("inf"), float("nan")])
def test_refuses_an_impossible_margin(margin: float) -> None:
    with pytest.raises(ValueError, match=f"cascade.margin must be .* got {margin}"):
        Cascade(LowRank(4), 8, margin=margin)


@pytest.mark.parametrize("spec", [Screened, Cascade])
def test_a_cascade_is_no_screen(spec: type[Screened]) -> None:
    with pytest.raises(ValueError, match="cannot be screened itself, it is cascade"):
        spec(Cascade(LowRank(4), 8), 8).check(16, 256)


TRANSFORMS = [(), (("div", 1.5),), (("tanh", 1.0), ("mul", 9.0))]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_kernels_change_nothing_in_fp32(toy: Toy, transform: tuple[Any, ...]) -> None:
    head = fitted(Screened(LowRank(5, Quantized(8)), candidates=20), toy).requires_grad_(False)
    head.transform = LogitTransform(transform)
    hidden = toy.hidden[:9].view(3, 3, 16)
    found = []
    for mode in ("off", "auto"):
        head.use_kernels(mode)  # type: ignore[arg-type]
        found.append((head(hidden), *head.topk(hidden, 30), *head.topk_log_prob(hidden, 30)))
    for plain, fast in zip(*found, strict=True):
        # without AVX-512 a kernel of integers scores the 8-bit rows, with states in 15 bits
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_kernels_are_as_near_as_torch_in_bf16(toy: Toy, transform: tuple[Any, ...]) -> None:
    """torch rounds rows and previews to bf16 where it has no integer product; then some candidates are others."""
    head = fitted(Screened(LowRank(5, Quantized(8)), candidates=20), toy).requires_grad_(False)
    head.transform = LogitTransform(transform)
    head, hidden = head.bfloat16(), toy.hidden[:60].bfloat16()
    assert isinstance(head.screen, ProjectedHead)
    projected = head.screen.prepare(hidden).double()  # the same for both
    stored = copy.deepcopy(head).double()
    rows, every = stored.screen.inner.dense()[0], hidden.double() @ stored.inner.weight.T
    exact = projected @ rows.double().T
    size = projected.abs() @ rows.double().abs().T
    error, chosen = {}, {}
    for mode in ("off", "auto"):
        head.use_kernels(mode)  # type: ignore[arg-type]
        previews = head.screen.scores(hidden).float()
        last = previews.topk(20).values[:, -1:]  # of tokens with this preview any may be chosen
        chosen[mode], error[mode] = previews >= last, (previews - exact).abs().amax(1)
        found = head.logits(hidden)
        for which, expected in (
            (previews > last, every.float()),
            (previews < last, previews + head.weight),
        ):
            wanted = head.transform(expected)
            torch.testing.assert_close(found[which], wanted[which], rtol=1e-5, atol=1e-4)
        clear = chosen[mode].sum(1) == 20
        assert clear.float().mean() > 0.5
        values, tokens = head.topk(hidden, 30)
        torch.testing.assert_close(values[clear], found.topk(30).values[clear])
        torch.testing.assert_close(found.gather(-1, tokens)[clear], values[clear])
        log_prob, same = head.topk_log_prob(hidden, 30)
        expected = values - found.logsumexp(-1, keepdim=True)
        torch.testing.assert_close(log_prob[clear], expected[clear], rtol=1e-5, atol=1e-5)
        assert torch.equal(same, tokens)
    # 2e-4: what rounding states to 15 bits may do, as in test_kernels.py
    assert (error["auto"] <= 2 * error["off"] + 2e-4 * size.amax(1)).all()
    bound = exact.topk(20).values[:, -1:]
    apart = (exact - bound).abs() <= 2 * torch.maximum(error["off"], error["auto"])[:, None]
    assert apart[chosen["off"] ^ chosen["auto"]].all()  # too near to the last one to tell


def test_compiles(toy: Toy) -> None:
    head = fitted(Screened(LowRank(5, Quantized(8)), candidates=20), toy).requires_grad_(False)
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(toy.hidden[:4]), head(toy.hidden[:4]))
