"""Scores of a quantized head straight from its packed codes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_softheads.kernels import load


def quantized_scores(
    hidden: Tensor,
    packed: Sequence[Tensor],
    widths: tuple[int, ...],
    scale: Tensor,
    *,
    middle: float | None = None,
    instructions: str = "native",
) -> Tensor:
    """`scale_v Σ_j (q_vj - middle) h_j`, `(B, V)` fp32.

    Args:
        hidden: `(B, D)` on the CPU.
        packed: what `pack_bits` made of the codes `(V, D)`, contiguous; widths: `PARTS[bits]`.
        scale: `(V,)` fp32, contiguous.
        middle: default `(2**bits - 1) / 2`.
    """
    bits = sum(widths)
    states = hidden.float().contiguous()
    out = torch.empty(len(states), len(scale))
    load("quantized", instructions).quantized_scores(
        (ctypes.c_void_p * len(packed))(*(p.data_ptr() for p in packed)),
        (ctypes.c_int64 * len(packed))(*widths),
        ctypes.c_int64(len(packed)),
        ctypes.c_int64(bits),
        ctypes.c_float((2**bits - 1) / 2 if middle is None else middle),
        ctypes.c_void_p(scale.data_ptr()),
        ctypes.c_int64(len(scale)),
        ctypes.c_int64(states.shape[1]),
        ctypes.c_void_p(states.data_ptr()),
        ctypes.c_int64(len(states)),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return out
