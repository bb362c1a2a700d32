"""The C++ kernels against the plain definition."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from hf_softheads import kernels
from hf_softheads.bitpack import PARTS, pack_bits
from hf_softheads.heads import LowRankResidual, ProductVQ, Quantized, TransformCoded
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.forms import kernel_rows
from hf_softheads.kernels import (
    INSTRUCTIONS,
    KernelUnavailable,
    dense,
    product_vq,
    quantized,
    rows,
    screened,
    select,
    transform_coded,
)
from hf_softheads.kernels.quantized import quantized_scores
from tests.heads.conftest import Toy, fitted

needs_compiler = pytest.mark.skipif(
    select("quantized").reason is not None, reason=str(select("quantized").reason)
)


def skip_without(instructions: str) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if instructions == "vnni" and not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        pytest.skip("this processor has no AVX-512 VNNI")
    if instructions == "avx2" and capability not in ("AVX2", "AVX512"):
        pytest.skip(f"this processor has {capability}")


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("bits", PARTS)
@pytest.mark.parametrize(
    ("vocab", "dim", "group", "batch"),
    [
        *[(301, 192, 192, 1), (301, 192, 64, 1), (130, 1152, 128, 2), (7, 200, 200, 6)],
        *[(130, 67, 67, 9), (1, 1, 1, 1), (130, 300, 300, 2), (9, 77, 11, 17), (65, 96, 16, 3)],
        *[(70, 1100, 1100, 1), (70, 160, 32, 2)],
    ],
)
def test_kernel_is_better_than_bf16(
    instructions: str, bits: int, vocab: int, dim: int, group: int, batch: int
) -> None:
    skip_without(instructions)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (vocab, dim), generator=generator).to(torch.uint8)
    scale = torch.rand(vocab, dim // group, generator=generator) + 0.1
    hidden = torch.randn(batch, dim, generator=generator) * torch.logspace(-3, 3, batch)[:, None]
    rows = (codes.double() - (2**bits - 1) / 2) * scale.double().repeat_interleave(group, 1)
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
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
def test_head_uses_it_for_decoding(bits: Any, group: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=generator)
    hidden = torch.randn(2, 3, 64, generator=generator).bfloat16()
    spec = Quantized(bits=bits, group=group)
    head = spec.module(64, 500)
    spec.fit(head, weight, None, None)
    head = head.bfloat16()
    assert head.kernel_or_reason(hidden) == "not in training"
    with torch.no_grad():
        head.kernels = "require"
        assert head.backend.startswith("C++")
        fast, best = head(hidden), head.topk(hidden, 3)
        head.kernels = "off"
        plain = head.float()(hidden.float())
        assert "switched off" in head.backend
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(best[0], fast.topk(3).values)


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("batch", [1, 2, 5, 19])
@pytest.mark.parametrize("bits", [1.5, 4.0, 8.0])
def test_transform_coded_kernel(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, instructions: str, batch: int, bits: float
) -> None:
    skip_without(instructions)
    use(monkeypatch, instructions)
    head = fitted(TransformCoded(bits=bits + 1.3, tiers=3), toy, bias=True).requires_grad_(False)
    hidden = toy.hidden[:batch]
    exact = head.scores(hidden)
    head.use_kernels("require")
    assert head.backend.startswith("C++")
    found = head.scores(hidden)
    assert (found - exact).abs().max() < 2e-4 * exact.abs().max()
    best, tokens = head.topk(hidden, 3)
    torch.testing.assert_close(best, found.topk(3).values)
    log_prob = head.log_prob(hidden, tokens[:, 0])
    torch.testing.assert_close(log_prob, found.log_softmax(-1).amax(-1))


@needs_compiler
@pytest.mark.parametrize(
    "spec",
    [
        *[LowRankResidual(2, 3, group=8), Quantized(3, frequent=40), Quantized(5, 4, frequent=40)],
        *[Quantized(4, levels="integers"), Quantized(2, 8, frequent=40, levels="integers")],
    ],
    ids=str,
)
def test_kernel_beside_other_rows(spec: HeadSpec, toy: Toy) -> None:
    head = fitted(spec, toy, bias=True).requires_grad_(False)
    exact = head.scores(toy.hidden[:5])
    head.use_kernels("require")
    assert (head.scores(toy.hidden[:5]) - exact).abs().max() < 2e-4 * exact.abs().max()


UNPACKED = [
    *[Quantized(4), Quantized(3, 8), Quantized(8, 4), Quantized(5, 2, frequent=37), Quantized(6)],
    *[Quantized(4, 8, levels="integers"), Quantized(8, frequent=37, levels="integers")],
    *[LowRankResidual(2, 2), TransformCoded(bits=4.0, tiers=3), TransformCoded(9.0, tiers=5)],
    *[ProductVQ(8, 16), ProductVQ(4, 64), ProductVQ(16, 256), ProductVQ(2, 4, rotation="none")],
]


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", UNPACKED, ids=str)
def test_unpacked_rows_are_those_of_the_definition(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, instructions: str, dtype: torch.dtype, spec: HeadSpec
) -> None:
    skip_without(instructions)
    use(monkeypatch, instructions)
    head = fitted(spec, toy)
    width = head.prepare(toy.hidden[:1]).shape[1]
    exact = torch.finfo(dtype).eps
    for start, stop in head.blocks():
        expected = head.rows(slice(start, stop)).T
        found = head.unpacked_product(torch.eye(width, dtype=dtype), start, stop)
        torch.testing.assert_close(found.float(), expected, rtol=2 * exact, atol=1e-6)
    hidden = toy.hidden[:100].to(dtype)
    scores = head.to(dtype).by_blocks(head.prepare(hidden))
    head.use_kernels("off")
    expected = head.float().plain_scores(hidden.float())
    assert (scores - expected).abs().max() <= 4 * exact * expected.abs().max()


@needs_compiler
@pytest.mark.parametrize("states", [1, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["AVX-512, AMX", "AVX-512", "AVX2"])
@pytest.mark.parametrize(
    "spec", [Quantized(4, 8), TransformCoded(bits=6.0, tiers=3), ProductVQ(16, 256)], ids=str
)
def test_any_number_of_states(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, spec: HeadSpec, states: int, dtype: Any, way: str
) -> None:
    monkeypatch.setattr(kernel_rows, "instructions", lambda _: way)
    head = fitted(spec, toy, bias=True).eval().to(dtype)
    hidden, labels = toy.hidden[:states].to(dtype), toy.labels[:states]
    if spec.name == "product_vq" and dtype == torch.float32:
        assert "8 bits" in head.kernel_or_reason(hidden)
        head.use_kernels("require")
    assert head.kernel_or_reason(hidden) is None
    found, log_prob = head(hidden), head.log_prob(hidden, labels)
    head.use_kernels("off")
    exact = head.float().plain_scores(hidden.float())
    share = 0.05 if spec.name == "product_vq" else 0.02  # of tables in 8 bits
    assert (found - exact).abs().max() <= share * exact.abs().max()
    expected = found.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    rounded = torch.finfo(dtype).eps * exact.detach().abs().max().item()  # rows of the other path
    torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=0.1 + rounded)


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    "spec",
    [ProductVQ(8, 256), ProductVQ(16, 16), ProductVQ(4, 64), ProductVQ(2, 4, rotation="none")],
)
def test_product_vq_kernel_errs_by_half_a_step_of_each_table(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, instructions: str, batch: int, spec: ProductVQ
) -> None:
    skip_without(instructions)
    use(monkeypatch, instructions)
    head = fitted(spec, toy, bias=True).requires_grad_(False)
    hidden = toy.hidden[:batch]
    exact = head.scores(hidden)
    x = head.prepare(hidden).view(batch, spec.groups, 1, -1)
    tables = (x * head.weight).sum(-1)
    step = (tables.amax(-1) - tables.amin(-1)).amax(1) / 255  # of the widest table of a block
    head.use_kernels("require")
    error = (head.scores(hidden) - exact).abs().amax(1)
    assert (error <= 0.51 * spec.groups * step + 1e-5).all()


@needs_compiler
@pytest.mark.parametrize("codes", [16, 256])
def test_product_vq_kernel_with_many_groups(codes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = (
        ProductVQ(groups=201, codes=codes, rotation="none").module(402, 700).requires_grad_(False)
    )
    head.weight.normal_(generator=generator)
    head.get_buffer("codes8" if codes == 256 else "codes4").random_(0, 256, generator=generator)
    hidden = torch.randn(3, 402, generator=generator)
    exact = head.scores(hidden)
    head.use_kernels("require")
    assert (head.scores(hidden) - exact).std() < 0.02 * exact.std()


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [slice(1), slice(None)])
@pytest.mark.parametrize(
    "spec",
    [Quantized(4), Quantized(3), TransformCoded(4.0), ProductVQ(8, 16), ProductVQ(8, 64)],
    ids=str,
)
def test_no_numbers_come_of_a_state_without_them(
    toy: Toy,
    monkeypatch: pytest.MonkeyPatch,
    instructions: str,
    value: float,
    columns: slice,
    spec: HeadSpec,
) -> None:
    skip_without(instructions)
    use(monkeypatch, instructions)
    head = fitted(spec, toy).requires_grad_(False)
    hidden = toy.hidden[:3].clone()
    head.use_kernels("require")
    expected = head.scores(hidden)
    hidden[1, columns] = value
    for batch in (hidden, hidden[1:2]):
        scores = head.scores(batch)
        assert not scores[len(batch) // 2].isfinite().any()
    assert torch.equal(head.scores(hidden)[::2], expected[::2])


@needs_compiler
def test_product_vq_turns_a_single_state_in_fp32(toy: Toy) -> None:
    head = fitted(ProductVQ(8, 16), toy).bfloat16().requires_grad_(False)
    state = toy.hidden[:1].bfloat16()
    expected = state.double() @ head.basis.double().T
    error = (head._turned(state) - expected).abs().max()
    assert error < 1e-5 * expected.abs().max() < (head.prepare(state) - expected).abs().max()


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 3_000_000)])
@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_large_pages_are_memory_like_any_other(
    monkeypatch: pytest.MonkeyPatch, large: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if not large:  # another system
        monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    numbers = torch.randint(256, shape).to(dtype)
    copy = kernels.in_large_pages(*shape, dtype=dtype).copy_(numbers)
    assert copy.is_contiguous()
    assert torch.equal(copy, numbers)


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("dim", [64, 200])
def test_dense_rows_are_multiplied_in_fp32(instructions: str, dim: int) -> None:
    skip_without(instructions)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, dim, generator=generator).bfloat16()
    hidden = torch.randn(3, dim, generator=generator)
    tokens = torch.randint(50, (3, 7), generator=generator)
    found = dense.dense_score(weight, hidden, tokens, instructions=instructions)
    expected = (hidden.double() @ weight.double().T).gather(1, tokens)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def use(monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    """Let every kernel run on a smaller instruction set."""
    for module in (product_vq, quantized, rows, transform_coded):
        monkeypatch.setattr(module, "load", lambda name, _: kernels.load(name, instructions))


def test_a_kernel_that_is_required_and_cannot_be_used_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_rows, "why_not", lambda _: "no C++ compiler (c++)")
    head = Quantized(bits=4, group=32).module(64, 100)
    head.kernels = "require"
    with pytest.raises(
        KernelUnavailable, match=r"quantized head cannot be used: no C\+\+ compiler"
    ):
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
        assert head.backend.startswith("torch")
        assert "no C++ compiler (" in head.backend
        assert "no-such-compiler" in head.backend
    finally:
        kernels.load.cache_clear()


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize(("vocab", "count"), [(1000, 9), (4099, 64), (70, 70), (33, 5), (1, 1)])
def test_largest_of_each_row_and_the_sum(instructions: str, vocab: int, count: int) -> None:
    skip_without(instructions)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, vocab, generator=generator) * torch.tensor([[0.1], [3.0], [40.0]])
    values, tokens = screened.largest(scores, count, instructions=instructions)
    assert torch.equal(values, scores.topk(count).values)
    assert torch.equal(scores.gather(1, tokens), values)
    assert (tokens.sort(1).values.diff(dim=1) > 0).all()  # all different
    total = screened.logsumexp(scores, instructions=instructions)
    torch.testing.assert_close(total.double(), scores.double().logsumexp(1), rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_largest_of_odd_rows(instructions: str) -> None:
    skip_without(instructions)
    nan, inf = torch.nan, torch.inf
    scores = torch.full((5, 200), -inf)
    scores[1] = 1.0  # the first of equals
    scores[2, 150:] = torch.arange(50.0)
    scores[3, ::7] = nan
    scores[4, 199], scores[4, 3] = inf, nan
    values, tokens = screened.largest(scores, 3, instructions=instructions)
    assert tokens[1].tolist() == [0, 1, 2]
    assert tokens[2].tolist() == [199, 198, 197]
    assert inf in values[4]
    assert ((tokens >= 0) & (tokens < 200)).all()
    total = screened.logsumexp(scores, instructions=instructions)
    torch.testing.assert_close(total, scores.logsumexp(1), equal_nan=True)
    assert screened.largest(scores[:0], 3)[1].shape == (0, 3)
    assert screened.logsumexp(scores[:0]).shape == (0,)


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_transform_coded_kernel_with_many_columns(
    monkeypatch: pytest.MonkeyPatch, instructions: str, batch: int
) -> None:
    skip_without(instructions)
    use(monkeypatch, instructions)
    generator = torch.Generator().manual_seed(0)
    head = TransformCoded(bits=10.0, tiers=2).module(300, 700).requires_grad_(False)
    for parameter in head.parameters():
        parameter.normal_(generator=generator)
    for buffer in (head.basis, head.codes):
        buffer.random_(0, 256, generator=generator)
    head.tier_gain[350:] = 1 + 16 * 9
    head.bits.copy_(torch.arange(600).view(2, 300) % 9)  # every width, and none
    hidden = torch.randn(batch, 300, generator=generator)
    exact = head.scores(hidden)
    head.use_kernels("require")
    assert (head.scores(hidden) - exact).abs().max() < 2e-4 * exact.abs().max()


THREADS = """
import os, sys, threading
import torch
from hf_softheads.kernels.screened import logsumexp
torch.set_num_threads(4)
scores = torch.arange(600.0).view(6, 100).repeat(50, 1)
expected = scores.logsumexp(1)
def check(): assert torch.allclose(logsumexp(scores), expected)
check()
callers = [threading.Thread(target=check) for _ in range(20)]
for caller in callers: caller.start()
for caller in callers: caller.join()
child = os.fork()
if not child:
    check()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print("done")
"""


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_threads_are_shared_by_callers_and_not_with_a_child() -> None:
    """A child process has none of its parent's threads; what waits for them waits for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THREADS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
