"""Nothing of the size of an attention matrix is ever made, forward or backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_softheads.attention.base import AttentionSpec
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
    inputs = sample(spec, batch=1, queries=LENGTH).requires_grad()
    with Largest() as largest:
        out = inputs()
        inputs.grads(out, torch.ones_like(out))
    assert largest.elements <= 4 * 64 * LENGTH  # heads, the queries of one block, keys
    assert largest.elements >= 4 * LENGTH * 8
