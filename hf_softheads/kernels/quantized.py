"""Scores of a quantized head straight from its packed codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_softheads.kernels import STATES, call, in_large_pages, load


def quantized_scores(
    hidden: Tensor,
    packed: Sequence[Tensor],
    widths: tuple[int, ...],
    scale: Tensor,
    *,
    middle: float | None = None,
    instructions: str = "native",
) -> Tensor:
    """`Σ_j scale_vg (q_vj - middle) h_j`, g the group of column j, `(B, V)` fp32.

    Args:
        hidden: `(B, D)` on the CPU.
        packed: what `pack_bits` made of the codes `(V, D)`, contiguous; widths: `PARTS[bits]`.
        scale: `(V, G)` fp32, contiguous, of D / G columns each.
        middle: default `(2**bits - 1) / 2`; another one only for codes of one width.
    """
    states = hidden.float().contiguous()
    vocab, groups = scale.shape
    out = in_large_pages(len(states), vocab, dtype=torch.float32)
    dim = states.shape[1]
    for some, scores in zip(states.split(STATES), out.split(STATES), strict=True):
        call(
            load("quantized", instructions).quantized_scores,
            *(packed, widths, len(packed), sum(widths)),
            (2.0 ** sum(widths) - 1) / 2 if middle is None else float(middle),
            *(scale, dim // groups, vocab, dim, some, len(some), scores),
        )
    return out
