"""Screen and refine: agreement, calibration, composition, bad input."""

from __future__ import annotations

import pytest
import torch

from hf_softheads.heads import (
    VQ,
    Dense,
    LowRank,
    ProductVQ,
    Quantized,
    ResidualVQ,
    Screened,
    TransformCoded,
)
from hf_softheads.heads.base import HeadSpec
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
    dense, found = toy.hidden @ toy.weight.T, head(toy.hidden)
    preview = head.screen(toy.hidden).float()
    best = preview.topk(20).indices
    torch.testing.assert_close(found.gather(1, best), dense.gather(1, best), rtol=1e-4, atol=1e-4)
    tail = torch.ones_like(found).scatter(1, best, 0.0).bool()
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
    torch.testing.assert_close(
        head(toy.hidden), head.inner(toy.hidden).float(), rtol=1e-4, atol=1e-3
    )


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


@pytest.mark.parametrize("candidates", [0, 257])
def test_refuses_impossible_candidates(candidates: int) -> None:
    with pytest.raises(ValueError, match=f"asked for {candidates} candidates; 1 to 256"):
        Screened(LowRank(4), candidates).check(16, 256)


def test_refuses_inner_heads_without_single_rows() -> None:
    with pytest.raises(ValueError, match="cannot read single rows of a vq head"):
        Screened(LowRank(4), 8, VQ(8)).check(16, 256)


def test_refuses_a_screen_of_screens() -> None:
    with pytest.raises(ValueError, match="cannot be screened itself"):
        Screened(Screened(LowRank(4), 8), 8).check(16, 256)


def test_checks_its_parts() -> None:
    with pytest.raises(ValueError, match="vq asked for 300 codes"):
        Screened(VQ(300), 8).check(16, 256)
