"""Sparsemax: the projection of the scores onto the simplex."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.attention import threshold
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Params, RowMap


@dataclass(frozen=True)
class Sparsemax(AttentionSpec, name="sparsemax"):
    """`w = relu(z - τ)`, τ such that `Σ w = 1`

    Source: arXiv:1602.02068.
    """

    exact_zeros: ClassVar[bool] = True

    def row_map(self) -> RowMap:
        return RowMap("entmax", (2.0,))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        return threshold.entmax(scores, keep, 2.0)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        weights = threshold.entmax(scores, keep, 2.0)
        return weights, threshold.entmax_grad(weights, grad, 2.0), {}
