"""Entmax for any α, fixed or learned per head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from hf_softheads.attention import threshold
from hf_softheads.attention.base import AttentionSpec, per_head
from hf_softheads.attention.call import Geometry, Params, RowMap
from hf_softheads.registry import Bounds


@dataclass(frozen=True)
class Entmax(AttentionSpec, name="entmax"):
    """`w = relu((α - 1) z - τ)^(1 / (α - 1))`, τ such that `Σ w = 1`

    Source: arXiv:1905.05702; a learned α per head: arXiv:1909.00015.

    Args:
        alpha: α > 1; 2 is sparsemax, towards 1 it becomes the softmax.
        learn: train α per head, kept in (1, 2) as `1 + σ(a_h)`; `alpha` is where it starts.
    """

    alpha: Annotated[float, Bounds(above=1, hint="the limit 1 is softmax")] = 1.5
    learn: bool = False
    exact_zeros: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.learn and self.alpha >= 2:
            raise ValueError(f"a learned alpha starts below 2, got {self.alpha}")

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """With `learn`: `a (H,)`."""
        if not self.learn:
            return {}
        start = self.alpha - 1
        return {"a": torch.full((geometry.heads,), math.log(start / (1 - start)))}

    def row_map(self) -> RowMap | None:
        return RowMap("entmax", (self.alpha,)) if self.alpha <= 2 and not self.learn else None

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        alpha: float | Tensor = self.alpha
        if self.learn:
            alpha = 1 + per_head(params["a"].to(scores.dtype)).sigmoid()
        return threshold.entmax(scores, keep, alpha)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.learn:
            return super().weights_vjp(scores, keep, params, grad)
        weights = threshold.entmax(scores, keep, self.alpha)
        return weights, threshold.entmax_grad(weights, grad, self.alpha), {}
