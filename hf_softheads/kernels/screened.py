"""What is left to do when all tokens have a preview: the best ones, and the normaliser."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hf_softheads.kernels import load


def largest(scores: Tensor, count: int, *, instructions: str = "native") -> tuple[Tensor, Tensor]:
    """`scores.topk(count)` of fp32 `scores (B, V)` on the CPU; of equal scores the first ones."""
    scores = scores.contiguous()
    values = torch.empty(len(scores), count)
    tokens = torch.empty(len(scores), count, dtype=torch.long)
    if len(scores):
        load("screened", instructions).largest_of_rows(
            *_matrix(scores),
            ctypes.c_int64(count),
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_void_p(tokens.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
    return values, tokens


def logsumexp(scores: Tensor, *, instructions: str = "native") -> Tensor:
    """`scores.logsumexp(-1)` of fp32 `scores (B, V)` on the CPU, without a matrix of exponentials."""
    scores = scores.contiguous()
    out = torch.empty(len(scores))
    if len(scores):
        load("screened", instructions).logsumexp_of_rows(
            *_matrix(scores),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
    return out


def _matrix(scores: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]:
    rows, columns = scores.shape
    return ctypes.c_void_p(scores.data_ptr()), ctypes.c_int64(rows), ctypes.c_int64(columns)
