"""Softmax attention on torch's fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hf_softheads.attention.base import Inputs


def exact(query: Tensor) -> Tensor:
    """The query in the dtype in which a scaled query is not rounded again.

    On a CPU the fused kernel is no slower in fp32; on accelerators the half-precision kernel is the reason to be
    here, and `attend` rounds the scaled query once.
    """
    return query if query.dtype == torch.float64 else query.float()


def possible(inputs: Inputs) -> bool:
    """Does the fused kernel know everything that these inputs ask for?"""
    return inputs.softcap is None and inputs.slopes is None and inputs.window is None


def attend(inputs: Inputs) -> Tensor:
    """`softmax(query @ key.mT * scaling) @ value`, `(B, H, Q, Dv)`."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if query.dtype != key.dtype:  # a scaled query
        if query.device.type == "cpu":
            key, value = key.to(query.dtype), value.to(query.dtype)
        else:
            query = query.to(key.dtype)
    mask, causal = _mask(inputs)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=inputs.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _mask(inputs: Inputs) -> tuple[Tensor | None, bool]:
    """The kernel's mask argument and its causal flag; the flag alone halves the work, so it is looked for."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    keep = inputs.keep
    if inputs.bias is None and queries == keys and (keep is None or _is_causal(keep)):
        return None, queries > 1
    if keep is None and queries == 1:
        return inputs.bias, False
    if keep is None:
        keep = torch.ones(queries, keys, dtype=torch.bool, device=inputs.query.device)
        keep = keep.tril(keys - queries)
    if inputs.bias is not None:
        return inputs.bias.to(inputs.query.dtype).masked_fill(~keep, -torch.inf), False
    return keep, False


def _is_causal(keep: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # a question about values would break the graph
    causal = torch.ones(keep.shape[-2:], dtype=torch.bool, device=keep.device).tril()
    return torch.equal(keep, causal.expand_as(keep))
