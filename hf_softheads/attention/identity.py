"""Scores as weights: attention without any nonlinearity, a control of the sink studies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Params, RowMap


@dataclass(frozen=True)
class Identity(AttentionSpec, name="identity"):
    """`w = z`, divided by `max(|Σ z|, 1)` or not

    Source: arXiv:2410.10781 (identity kernel). Weights may be negative.

    Args:
        normalised: divide by the row's sum.
    """

    normalised: bool = True
    sums_to_one: ClassVar[bool] = False
    sinks: ClassVar[bool] = False

    def row_map(self) -> RowMap:
        return RowMap("identity", (float(self.normalised),))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        scores = scores * keep
        if not self.normalised:
            return scores
        return scores / scores.sum(-1, keepdim=True).abs().clamp(min=1)
