"""Softpick: a rectified softmax whose rows may sum to less than one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, Params


@dataclass(frozen=True)
class Softpick(AttentionSpec, name="softpick"):
    """`w = relu(exp(z) - 1) / (Σ |exp(z) - 1| + ε)`

    Source: arXiv:2504.20966, eq. 5. Evaluated as `exp(z - M) - exp(-M)`, M the row's maximum but at least 0: a row of
    negative scores is 0 whatever M is, and nothing overflows.

    Args:
        eps: ε, in the shifted space as in the authors' code (1e-8 there, 1e-6 in their kernel).
    """

    eps: float = 1e-8
    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True
    sinks: ClassVar[bool] = False

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        shifted = self._shifted(scores, keep)[0]
        return shifted.relu() / (shifted.abs().sum(-1, keepdim=True) + self.eps)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`∂w_i/∂z_j = exp(z_j - M) / Σ · (δ_ij [z_i > 0] - sign(z_j) w_i)`"""
        shifted, exponential = self._shifted(scores, keep)
        total = shifted.abs().sum(-1, keepdim=True) + self.eps
        weights = shifted.relu() / total
        inner = (weights * grad).sum(-1, keepdim=True)
        signed = torch.where(shifted > 0, grad - inner, inner.expand_as(grad))
        return weights, (signed * exponential).div_(total).masked_fill_(~keep, 0), {}

    def _shifted(self, scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """`exp(z - M) - exp(-M)`, 0 where `~keep`, and `exp(z - M)`."""
        scores = scores.masked_fill(~keep, 0)
        top = scores.detach().amax(-1, keepdim=True).clamp(min=0)
        exponential = (scores - top).exp()
        return exponential - (-top).exp(), exponential
