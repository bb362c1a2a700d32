"""The C++ kernels against the plain definition."""

from __future__ import annotations

import pytest
import torch

from hf_softheads import kernels
from hf_softheads.heads import Quantized
from hf_softheads.heads.packing import PARTS, pack_bits
from hf_softheads.kernels import INSTRUCTIONS, KernelUnavailable, why_not
from hf_softheads.kernels.quantized import quantized_scores

needs_compiler = pytest.mark.skipif(
    why_not("quantized") is not None, reason=str(why_not("quantized"))
)


def skip_without(instructions: str) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if instructions == "avx2" and capability not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor has {capability}")


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("bits", PARTS)
@pytest.mark.parametrize(
    ("vocab", "dim", "batch"),
    [(301, 192, 1), (7, 200, 6), (130, 67, 9), (1, 1, 1), (130, 300, 2), (9, 77, 17)],
)
def test_kernel_is_better_than_bf16(
    instructions: str, bits: int, vocab: int, dim: int, batch: int
) -> None:
    skip_without(instructions)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (vocab, dim), generator=generator).to(torch.uint8)
    scale = torch.rand(vocab, generator=generator) + 0.1
    hidden = torch.randn(batch, dim, generator=generator) * torch.logspace(-3, 3, batch)[:, None]
    rows = (codes.double() - (2**bits - 1) / 2) * scale.double()[:, None]
    exact = hidden.double() @ rows.T
    found = quantized_scores(
        hidden, pack_bits(codes, bits), PARTS[bits], scale, instructions=instructions
    )
    size = hidden.double().abs() @ rows.abs().T  # what rounding errors are relative to
    assert ((found - exact).abs() <= 2e-4 * size).all()
    eager = hidden.bfloat16() @ rows.bfloat16().T
    if dim > 100:
        assert (found - exact).abs().max() < (eager - exact).abs().max()


@needs_compiler
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_head_uses_it_for_decoding(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=generator)
    hidden = torch.randn(2, 3, 64, generator=generator).bfloat16()
    spec = Quantized(bits=bits)  # type: ignore[arg-type]
    head = spec.module(64, 500)
    spec.fit(head, weight, None, None)
    head = head.bfloat16()
    assert head.kernel_or_reason(hidden) == "no gradients"
    assert "fp32" in str(head.kernel_or_reason(hidden.float()))
    with torch.no_grad():
        head.kernels = "require"
        assert "C++" in head.notes()[0]
        fast, best = head(hidden), head.topk(hidden, 3)
        head.kernels = "off"
        plain = head.float()(hidden.float())
        assert "none" in head.notes()[0]
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(best[0], fast.topk(3).values)


def test_a_kernel_that_is_required_and_cannot_be_used_is_an_error() -> None:
    head = Quantized(bits=4, group=32).module(64, 100)
    head.kernels = "require"
    with pytest.raises(KernelUnavailable, match="only for one scale per row"):
        head(torch.zeros(1, 64))


def test_without_a_compiler_everything_works_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    kernels.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    try:
        head = Quantized(bits=4).module(64, 100)
        with torch.no_grad():
            head.weight.fill_(1.0)
            assert head.bfloat16()(torch.ones(1, 64, dtype=torch.bfloat16)).shape == (1, 100)
        assert head.notes()[0].startswith("decoding kernel: none, no C++ compiler (")
        assert "no-such-compiler" in head.notes()[0]
    finally:
        kernels.load.cache_clear()
