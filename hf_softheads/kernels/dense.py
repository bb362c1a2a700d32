"""Scores of some tokens from the rows of a bf16 matrix, where they lie."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hf_softheads.kernels import load


def dense_score(
    weight: Tensor, hidden: Tensor, tokens: Tensor, *, instructions: str = "native"
) -> Tensor:
    """`weight[tokens] @ hidden` with products and sums in fp32, `(B, M)`.

    Args:
        weight: `(V, D)` bf16, contiguous; hidden: `(B, D)`; tokens: `(B, M)` int64, in `[0, V)`.
    """
    states, tokens = hidden.float().contiguous(), tokens.contiguous()
    out = torch.empty(tokens.shape)
    load("dense", instructions).dense_score(
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(weight.shape[1]),
        ctypes.c_void_p(tokens.data_ptr()),
        ctypes.c_int64(tokens.shape[1]),
        ctypes.c_void_p(states.data_ptr()),
        ctypes.c_int64(len(states)),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return out
