"""Torch's own product of 8-bit codes against the plain definition."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_softheads.heads import LowRank, LowRankResidual, Quantized, Screened, quantized
from hf_softheads.heads.base import HeadSpec
from hf_softheads.kernels.onednn import int8_packed, int8_scores, why_no_int8
from tests.heads.conftest import Toy

needs_int8 = pytest.mark.skipif(why_no_int8() is not None, reason=str(why_no_int8()))


@needs_int8
@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize(
    ("vocab", "dim", "batch"), [(301, 192, 1), (7, 200, 6), (1, 1, 1), (130, 300, 2), (5, 77, 0)]
)
def test_is_better_than_bf16(bits: int, vocab: int, dim: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (vocab, dim), generator=generator).to(torch.uint8)
    scale = torch.rand(vocab, generator=generator) + 0.1
    hidden = torch.randn(batch, dim, generator=generator) * torch.logspace(-3, 3, batch)[:, None]
    rows = (codes.double() - (2**bits - 1) / 2) * scale.double()[:, None]
    exact = hidden.double() @ rows.T
    found = int8_scores(hidden, int8_packed(codes.__getitem__, vocab, bits), scale)
    assert found.shape == exact.shape
    assert ((found - exact).abs() <= 2e-4 * (hidden.double().abs() @ rows.abs().T)).all()
    if dim > 100:
        eager = hidden.bfloat16() @ rows.bfloat16().T
        assert (found - exact).abs().max() < (eager - exact).abs().max()


def test_a_state_of_zeros_scores_zero() -> None:
    if why_no_int8() is None:
        codes = torch.full((3, 8), 200, dtype=torch.uint8)
        packed = int8_packed(codes.__getitem__, 3, 8)
        assert (int8_scores(torch.zeros(2, 8), packed, torch.ones(3)) == 0).all()


@needs_int8
@pytest.mark.parametrize("kernels", ["auto", "off", "require"])
@pytest.mark.parametrize(
    "spec",
    [
        *[Quantized(8), LowRankResidual(2, 8), LowRank(12, Quantized(8))],
        *[Quantized(8, levels="integers"), Quantized(8, frequent=40, levels="integers")],
    ],
    ids=str,
)
def test_heads_of_8_bits_decode_by_it(spec: HeadSpec, kernels: str, toy: Toy) -> None:
    head = spec.module(*toy.shape, bias=True)
    spec.fit(head, toy.weight, torch.linspace(-1, 1, 256), toy.stats)
    head = head.bfloat16().requires_grad_(False)
    head.use_kernels(kernels)  # type: ignore[arg-type]
    assert head.backend.startswith("torch, oneDNN int8 ")
    assert ("switched off" in head.backend) == (kernels == "off")
    hidden = toy.hidden[:6].bfloat16().view(2, 3, 16)
    exact = head.float()(hidden.float())
    found = head.bfloat16()(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0.2)
    values, tokens = head.topk(hidden, 3)
    torch.testing.assert_close(values, found.topk(3).values)
    torch.testing.assert_close(
        head.log_prob(hidden, tokens[..., 0]), found.log_softmax(-1).amax(-1)
    )
    again = copy.deepcopy(head)  # without the opaque copy of the codes
    assert torch.equal(again(hidden), found)


@needs_int8
def test_fewer_bits_too_where_there_is_no_kernel(toy: Toy) -> None:
    head = Quantized(3).module(*toy.shape)
    Quantized(3).fit(head, toy.weight, None, toy.stats)
    head = head.bfloat16().requires_grad_(False)
    hidden = toy.hidden[:6].bfloat16()
    head.use_kernels("off")
    exact = head.float()(hidden.float())
    torch.testing.assert_close(head.bfloat16()(hidden), exact, rtol=1e-2, atol=0.1)
    assert "oneDNN int8 instead of a kernel: switched off" in head.backend


@needs_int8
def test_new_codes_are_seen(toy: Toy) -> None:
    head = Quantized(8).module(*toy.shape)
    Quantized(8).fit(head, toy.weight, None, None)
    head = head.bfloat16().requires_grad_(False)
    hidden = toy.hidden[:2].bfloat16()
    before = head(hidden)
    head.codes8.copy_(head.codes8.flip(0))
    head.weight.copy_(head.weight.flip(0))
    assert torch.equal(head(hidden), before.flip(1))


def test_trains_and_compiles_by_rebuilt_rows(toy: Toy) -> None:
    spec = LowRank(6, Quantized(8))
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, toy.stats)
    head = head.bfloat16()
    hidden = toy.hidden[:4].bfloat16()
    head(hidden).float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    with torch.no_grad():
        compiled = torch.compile(head, backend="eager", fullgraph=True)(hidden).float()
        torch.testing.assert_close(compiled, head(hidden), rtol=2e-2, atol=0.3)


def test_without_it_a_screen_takes_the_plain_path(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Screened(LowRank(8, Quantized(8)), 20)
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, toy.stats)
    head = head.bfloat16().requires_grad_(False)
    head.use_kernels("off")
    hidden = toy.hidden.bfloat16()[:64]
    fast = head(hidden)
    monkeypatch.setattr(quantized, "why_no_int8", lambda: "it is missing")
    assert head.backend == "screen: torch (switched off); candidates: torch"
    top = toy.weight.bfloat16().float() @ hidden.float().T
    for scores in (fast, head(hidden)):
        assert (scores.argmax(-1) == top.argmax(0)).float().mean() > 0.95
