"""What is left to do when all tokens have a preview: the best ones, and the normaliser. Operators without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_softheads.kernels import call, load


@torch.library.custom_op(
    "softheads::largest",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor scores, int count, *, str instructions='native') -> (Tensor, Tensor)",
)
def largest(scores: Tensor, count: int, *, instructions: str = "native") -> tuple[Tensor, Tensor]:
    """`scores.topk(count)` of fp32 `scores (B, V)` on the CPU; of equal scores the first ones."""
    scores = scores.contiguous()
    values = torch.empty(len(scores), count)
    tokens = torch.empty(len(scores), count, dtype=torch.long)
    if len(scores):
        function = load("screened", instructions).largest_of_rows
        call(function, scores, *scores.shape, count, values, tokens)
    return values, tokens


@largest.register_fake
def _(scores: Tensor, count: int, **rest: Any) -> tuple[Tensor, Tensor]:
    shape = scores.shape[0], count
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.long)


@torch.library.custom_op(
    "softheads::logsumexp",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor scores, *, str instructions='native') -> Tensor",
)
def logsumexp(scores: Tensor, *, instructions: str = "native") -> Tensor:
    """`scores.logsumexp(-1)` of fp32 `scores (B, V)` on the CPU, without a matrix of exponentials."""
    scores = scores.contiguous()
    out = torch.empty(len(scores))
    if len(scores):
        call(load("screened", instructions).logsumexp_of_rows, scores, *scores.shape, out)
    return out


@logsumexp.register_fake
def _(scores: Tensor, **rest: Any) -> Tensor:
    return scores.new_empty(scores.shape[0])
