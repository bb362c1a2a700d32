"""The first two moments of a dense head's logits from one Gram matrix, without any logit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_softheads.losses.base import LogitStatistic
from hf_softheads.training.token_chunks import widened

_BLOCK = 2**22


def moments(
    hidden: Tensor, labels: Tensor, weight: Tensor, scale: float
) -> dict[LogitStatistic, Tensor]:
    """`target`, `mean` and `mean_square` of `z = scale · w h` per hidden state, `(n,)` each, differentiable.

    `Σ_v z_v ∝ (Σw)·h` and `Σ_v z_v² ∝ hᵀ (wᵀw) h` (1412.7091): `O(V D²)` for the matrix once, `O(D²)` a token.
    """
    target, mean, square = _Moments.apply(hidden, labels, weight)
    return {"target": target * scale, "mean": mean * scale, "mean_square": square * scale**2}


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor) -> Any:
        x, vocab, dim = widened(hidden), *weight.shape
        square, total = x.new_zeros(dim, dim), weight.sum(0, dtype=x.dtype)
        for block in weight.split(_rows(weight)):
            square += block.T @ block
        through = x @ square
        ctx.save_for_backward(hidden, labels, weight, total, through)
        own = widened(weight[labels])
        return (own * x).sum(-1), x @ total / vocab, (through * x).sum(-1) / vocab

    @staticmethod
    def backward(ctx: Any, target: Tensor, mean: Tensor, square: Tensor) -> Any:
        hidden, labels, weight, total, through = ctx.saved_tensors
        x, vocab = widened(hidden), len(weight)
        grad = target.unsqueeze(-1) * weight[labels] + torch.outer(mean / vocab, total)
        grad += (2 / vocab) * square.unsqueeze(-1) * through
        turn = ((2 / vocab) * (x.T * square) @ x).to(weight.dtype)  # (D, D)
        shift = mean @ x / vocab
        grad_weight = torch.empty_like(weight)
        rows = _rows(weight)
        for block, into in zip(weight.split(rows), grad_weight.split(rows), strict=True):
            torch.add(block @ turn, shift, out=into)
        grad_weight.index_add_(0, labels, (target.unsqueeze(-1) * x).to(weight.dtype))
        return grad.to(hidden.dtype), None, grad_weight


def _rows(weight: Tensor) -> int:
    return max(256, _BLOCK // weight.shape[-1])
