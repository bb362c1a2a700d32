"""Small fits that several heads share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_STEPS = 30


@torch.no_grad()
def least_at(slope: Callable[[float], float], low: float, high: float) -> float:
    """Where a convex function of a positive number is least, by bisection of its slope on a logarithmic scale."""
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return float((low * high) ** 0.5)


@torch.no_grad()
def best_scale(scores: Tensor, wanted: Tensor, low: float = 1e-3, high: float = 1e3) -> float:
    """The s of least `E KL(wanted ‖ softmax(s · scores))`; `scores` and probabilities `wanted` are `(N, V)`."""
    target = (wanted * scores).sum(-1)

    def slope(scale: float) -> float:
        return float((((scale * scores).softmax(-1) * scores).sum(-1) - target).mean())

    return least_at(slope, low, high)
