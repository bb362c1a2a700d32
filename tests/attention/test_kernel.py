"""The C++ kernel against the same variant in float64, which runs on plain torch operations."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_softheads import kernels
from hf_softheads.attention.base import AttentionSpec, run
from hf_softheads.attention.call import Geometry, Inputs
from hf_softheads.attention.engines import cpp, query_blocks, sdpa
from hf_softheads.attention.mixed import Mixed
from hf_softheads.attention.sliding_window import SlidingWindow
from hf_softheads.kernels import KernelUnavailable, why_not
from hf_softheads.kernels import attention as kernel
from hf_softheads.registry import variants
from tests.attention.samples import SPECS, Sample, label, left_padded, sample

WITH_KERNEL = [s for s in SPECS if s.row_map() is not None and not isinstance(s, Mixed)]

needs_compiler = pytest.mark.skipif(
    why_not("attention") is not None, reason=str(why_not("attention"))
)
every_row_map = pytest.mark.parametrize("spec", WITH_KERNEL, ids=label)


@pytest.fixture
def only_kernel(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """fp32 attention must not run on anything else; float64 may."""

    def guard(module: Any) -> None:
        attend = module.attend

        def guarded(*args: Any) -> Tensor:
            inputs = next(a for a in args if isinstance(a, Inputs))
            assert inputs.query.dtype == torch.float64, "the kernel was not used"
            out: Tensor = attend(*args)
            return out

        monkeypatch.setattr(module, "attend", guarded)

    guard(query_blocks)
    guard(sdpa)
    return monkeypatch


def cases(spec: AttentionSpec) -> dict[str, Sample]:
    """Masks that are ranges and masks that are not, widths with and without a rest, one block and several."""
    draw = torch.Generator().manual_seed(5)
    ragged = torch.rand(2, 1, 70, 70, generator=draw) < 0.4
    ragged[:, :, 13] = False
    per_head = torch.rand(1, 4, 9, 140, generator=draw) < 0.7
    return {
        "causal": sample(spec, queries=130, dim=64),
        "odd width": sample(spec, queries=61, dim=22),
        "many heads": sample(spec, heads=4, kv_heads=4, queries=17, dim=48),
        "after a prefix": sample(spec, queries=50, keys=161, dim=32),
        "decoding": sample(spec, queries=1, keys=77, dim=32),
        "decoding, odd width": sample(spec, queries=1, keys=77, dim=20),
        "padded": sample(spec, queries=70, dim=16, keep=left_padded([70, 31], 70)),
        "ragged": sample(spec, queries=70, dim=16, keep=ragged),
        "every head its mask": sample(spec, queries=9, keys=140, dim=16, keep=per_head),
    }


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    got, want = got.detach().double(), want.detach().double()
    scale, difference = max(1.0, float(want.abs().max())), float((got - want).abs().max())
    assert difference <= tolerance * scale, f"{name}: {difference:.1e}"


def compare(name: str, given: Sample, tolerance: float) -> None:
    given = given.requires_grad()
    exact = given.to(torch.float64).requires_grad()
    out, want = given(), exact()
    close(name, out, want, tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    wanted = exact.grads(want, grad.double())
    for leaf, found in given.grads(out, grad).items():
        close(f"{name}, d{leaf}", found, wanted[leaf], 10 * tolerance)
    with torch.no_grad():
        assert torch.equal(given(), out)


def accuracy(spec: AttentionSpec) -> float:
    """1e-5, more where fp32 itself is further from float64 on torch operations too."""
    sharp = (
        spec.name == "asentmax"
    )  # scores grow by β log(n)^γ, and their rounding errors with them
    return 1e-5 * max(10.0 if sharp else 1.0, getattr(spec, "p", 1.0))


@needs_compiler
@every_row_map
def test_kernel_equals_the_definition(spec: AttentionSpec, only_kernel: pytest.MonkeyPatch) -> None:
    for name, given in cases(spec).items():
        compare(name, given, accuracy(spec))


@needs_compiler
@every_row_map
@pytest.mark.parametrize("instructions", ["avx2", "plain"])
def test_smaller_instruction_sets(
    spec: AttentionSpec, instructions: str, only_kernel: pytest.MonkeyPatch
) -> None:
    try:
        kernels.load("attention", instructions)
    except KernelUnavailable as error:
        pytest.skip(str(error))
    smaller = functools.partial(kernels.load, instructions=instructions)
    only_kernel.setattr(kernel, "load", smaller)
    compare(instructions, sample(spec, queries=70, dim=22), accuracy(spec))
    compare(instructions, sample(spec, queries=1, keys=70, dim=16), accuracy(spec))


@needs_compiler
@every_row_map
def test_bfloat16(spec: AttentionSpec, only_kernel: pytest.MonkeyPatch) -> None:
    """Rounded once, at the end; so are the gradients."""
    for given in (
        sample(spec, queries=130, dim=64, dtype=torch.bfloat16),
        sample(spec, queries=61, dim=21, dtype=torch.bfloat16),
        sample(spec, queries=1, keys=90, dim=32, dtype=torch.bfloat16),
    ):
        same = given.to(torch.float32)
        close("out", given(), same(), 2**-8)
        compare("gradients", given, 2**-8)


@needs_compiler
@every_row_map
def test_soft_cap_slopes_and_window(spec: AttentionSpec, only_kernel: pytest.MonkeyPatch) -> None:
    looks_back = isinstance(spec, SlidingWindow) and not spec.two_sided  # refused where all is seen
    for keep, causal in ((None, True), (left_padded([70, 40], 70), True), (None, False)):
        if looks_back and not causal:
            continue
        given = sample(spec, queries=70, dim=16, scale=3.0).requires_grad()
        grad = torch.randn(2, 4, 70, 16, generator=torch.Generator().manual_seed(1))
        if not causal:
            keep = torch.ones(1, 1, 70, 70, dtype=torch.bool)
        found = []
        for s in (given, given.to(torch.float64).requires_grad()):
            inputs = Inputs(s.query, s.key, s.value, keep, 0.25, hidden=s.hidden, causal=causal)
            slopes = torch.tensor([-0.2, 0.1, 0.0, -0.5], dtype=s.query.dtype)
            inputs = inputs.replace(softcap=2.0, slopes=slopes, window=19)
            out = run(spec, s.params, inputs)
            found.append((out, s.grads(out, grad.to(out.dtype))))
        (out, grads), (want, wanted) = found
        close("out", out, want, accuracy(spec))
        for name in grads:
            close(f"d{name}", grads[name], wanted[name], 10 * accuracy(spec))


@needs_compiler
@pytest.mark.parametrize("threads", [1, 5])
def test_threads_share_the_work(threads: int) -> None:
    """More threads than heads, and a result that does not depend on who was first."""
    given = sample(SPECS[0], batch=1, heads=2, kv_heads=1, queries=300, dim=16).requires_grad()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compare("threads", given, 1e-5)
        grad = torch.ones(1, 2, 300, 16)
        first, second = (given.grads(given(), grad) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_compiler
def test_what_is_not_a_number_stays_so() -> None:
    given = sample(variants("attention")["softmax"](), queries=20, dim=16)
    given.query[0, 0, 7] = math.nan
    out = given()
    assert out[0, 0, 7].isnan().all()
    assert out[0, 0, :7].isfinite().all()
    assert out[0, 1].isfinite().all()


@needs_compiler
def test_operators_are_sound() -> None:
    """Schema, fake tensors, autograd registration and tracing, by torch's own checks."""
    given = sample(SPECS[0], queries=9, dim=16).requires_grad()
    keep = left_padded([9, 6], 9)
    arguments = (given.query, given.key, given.value, keep, None, "softmax", [], 0.25, 0.0, 0, True)
    torch.library.opcheck(kernel.attention, arguments)


@needs_compiler
def test_unknown_row_map() -> None:
    with pytest.raises(KernelUnavailable, match="no row map 'sofmax'"):
        kernel.map_index("sofmax")


def test_without_a_compiler_the_torch_path_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = variants("attention")["softpick"]()
    given = sample(spec, queries=30)
    want = given.to(torch.float64)()
    monkeypatch.setattr(cpp, "why_not", lambda _: "no C++ compiler (c++)")
    close("out", given(), want, 1e-5)
    geometry = Geometry(heads=2, kv_heads=1, head_dim=16, hidden_size=32)
    (choice,) = spec.module(geometry).engines(torch.zeros(()))
    assert str(choice).startswith("query blocks (C++ kernel: no C++ compiler (c++); ")
