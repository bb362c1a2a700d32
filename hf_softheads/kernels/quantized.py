"""Scores of a quantized head straight from its packed codes."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hf_softheads.kernels import load


def quantized_scores(
    hidden: Tensor, packed: list[Tensor], widths: tuple[int, ...], bits: int, scale: Tensor
) -> Tensor:
    """`scale_v Σ_j (q_vj - (2**bits - 1) / 2) h_j`, `(B, V)` fp32.

    Args:
        hidden: `(B, D)` on the CPU.
        packed: what `pack_bits` made of the codes `(V, D)`; widths: `PARTS[bits]`.
        scale: `(V,)` fp32, contiguous.
    """
    function = load("quantized").quantized_scores
    states = hidden.float().contiguous()
    out = torch.empty(len(states), len(scale))
    planes = (ctypes.c_void_p * len(packed))(*(p.data_ptr() for p in packed))
    sizes = (ctypes.c_int64 * len(packed))(*widths)
    whole = ctypes.c_int64
    function(
        planes,
        sizes,
        whole(len(packed)),
        whole(bits),
        ctypes.c_void_p(scale.data_ptr()),
        whole(len(scale)),
        whole(states.shape[1]),
        ctypes.c_void_p(states.data_ptr()),
        whole(len(states)),
        ctypes.c_void_p(out.data_ptr()),
        whole(torch.get_num_threads()),
    )
    return out
