"""A differentiable recall at k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.losses.base import LossSpec
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class SoftTopK(LossSpec, name="soft_top_k"):
    """`−(1/|P|) Σ_{c ∈ P} log σ(α (z_c − t))` with the threshold t such that `Σ_v σ(α (z_v − t)) = k`.

    DEXML, 2310.10636. `labels`: `(N,)`, or `(N, P)` filled up with negative numbers. Trains the label to be among the
    k best, as a screen needs; the order among them does not matter.

    Raises:
        ValueError: `k` is not below the vocabulary's size.
    """

    k: Count = 32
    alpha: Positive = 1.0

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        if self.k >= logits.shape[-1]:
            raise ValueError(
                f"soft_top_k.k = {self.k} must be below the vocabulary's {logits.shape[-1]} tokens"
            )
        chosen = labels if labels.ndim == 2 else labels.unsqueeze(-1)
        given = chosen >= 0
        ids = torch.where(given, chosen, chosen[:, :1])
        threshold: Tensor = _Threshold.apply(logits, self.k, self.alpha)
        each = -F.logsigmoid(self.alpha * (logits.gather(-1, ids) - threshold.unsqueeze(-1)))
        return (each * given).sum(-1) / given.sum(-1)


class _Threshold(torch.autograd.Function):
    """t(z) by bisection; its gradient by the implicit function theorem: `v / Σv` with `v = σ(1−σ)`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int, alpha: float) -> Tensor:
        reach = abs(torch.logit(torch.tensor(k / z.shape[-1])).item()) / alpha + 1e-3
        low, high = z.amin(-1) - reach, z.amax(-1) + reach
        for _ in range(32 if z.dtype == torch.float32 else 64):
            middle = (low + high) / 2
            many = torch.sigmoid(alpha * (z - middle.unsqueeze(-1))).sum(-1) > k
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)
        threshold = (low + high) / 2
        ctx.save_for_backward(z, threshold)
        ctx.alpha = alpha
        return threshold

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, threshold = ctx.saved_tensors
        s = torch.sigmoid(ctx.alpha * (z - threshold.unsqueeze(-1)))
        v = s * (1 - s)
        return grad.unsqueeze(-1) * v / v.sum(-1, keepdim=True), None, None
