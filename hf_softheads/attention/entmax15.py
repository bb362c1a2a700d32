"""Entmax with α = 1.5: between softmax and sparsemax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.attention import threshold
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Params, RowMap


@dataclass(frozen=True)
class Entmax15(AttentionSpec, name="entmax15"):
    """`w = relu(z / 2 - τ)²`, τ such that `Σ w = 1`

    Source: arXiv:1905.05702.
    """

    exact_zeros: ClassVar[bool] = True

    def row_map(self) -> RowMap:
        return RowMap("entmax", (1.5,))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        return threshold.entmax(scores, keep, 1.5)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weights = threshold.entmax(scores, keep, 1.5)
        return weights, threshold.entmax_grad(weights, grad, 1.5), {}
