"""Softpick: a rectified softmax whose rows may sum to less than one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Params, RowMap
from hf_softheads.registry import Positive

_LARGEST = 75.0  # exp of it times 10⁵ keys is finite in fp32


@dataclass(frozen=True)
class Softpick(AttentionSpec, name="softpick"):
    """`w = relu(exp(z) - 1) / (Σ |exp(z) - 1| + ε)`

    Source: arXiv:2504.20966. Evaluated as `expm1(z)`, which keeps small scores, shifted only where it would
    overflow.

    Args:
        eps: ε, relative to `exp(max(z, 0))` as in the authors' code (1e-8 there, 1e-6 in their kernel).
    """

    eps: Positive = 1e-8
    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True
    sinks: ClassVar[bool] = False

    def row_map(self) -> RowMap:
        return RowMap("softpick", (self.eps,))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        raised, eps, _ = self._raised(scores, keep)
        return raised.relu() / (raised.abs().sum(-1, keepdim=True) + eps)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`∂w_i/∂z_j = exp(z_j) / Σ · (δ_ij [z_i > 0] - sign(z_j) w_i)`"""
        raised, eps, floor = self._raised(scores, keep)
        total = raised.abs().sum(-1, keepdim=True) + eps
        weights = raised.relu().div_(total)
        inner = torch.linalg.vecdot(weights, grad).unsqueeze(-1)
        signed = (grad - 2 * inner).mul_(raised > 0).add_(inner)
        return weights, raised.add_(floor).mul_(signed).mul_(keep.to(total.dtype) / total), {}

    def _raised(self, scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(exp(z) - 1) · exp(-c)`, 0 where `~keep`; ε in the same unit; and `exp(-c)`. `c > 0` where exp overflows."""
        scores = scores * keep
        top = scores.detach().amax(-1, keepdim=True).clamp(min=0)
        shift = (top - _LARGEST).relu()
        asking_is_cheap = scores.device.type == "cpu" and not torch.compiler.is_compiling()
        if not asking_is_cheap or bool(shift.any()):
            raised = (scores - shift).expm1() - (-shift).expm1()
        else:
            raised = scores.expm1_()
        return raised, self.eps * (top - shift).exp(), (-shift).exp()
