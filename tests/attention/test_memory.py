"""Nothing of the size of an attention matrix is ever made, forward or backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_softheads.attention import Softpick
from hf_softheads.attention.base import AttentionSpec, Inputs, run
from tests.attention.samples import SPECS, label, sample

LENGTH = 512


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("spec", [s for s in SPECS if s == type(s)()], ids=label)
def test_no_square_tensor(spec: AttentionSpec) -> None:
    def largest(length: int) -> int:
        inputs = sample(spec, batch=1, queries=length).requires_grad()
        with Largest() as found:
            out = inputs()
            inputs.grads(out, torch.ones_like(out))
        return found.elements

    elements = largest(LENGTH)
    assert elements >= 4 * LENGTH * 8
    if elements > 4 * 64 * LENGTH:  # heads, the queries of one block, keys; features may be more
        assert largest(2 * LENGTH) <= 2.1 * elements


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "blocks"])
def test_long_sequences(compiled: bool) -> None:
    """8,192 tokens in 4 heads: one square matrix would be a GiB."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 8192, 8, generator=generator) for _ in range(3))
    inputs = Inputs(query, key, value, None, 8**-0.5, compiled=compiled)
    run(Softpick(), {}, inputs)  # allocators and kernels settle
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark falls to what is in use
    before = _resident("VmRSS")
    out = run(Softpick(), {}, inputs.replace(query=query.requires_grad_()) if compiled else inputs)
    if compiled:
        out.sum().backward()
        assert query.grad is not None
    assert out.isfinite().all()
    assert _resident("VmHWM") - before < 2**28


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])
