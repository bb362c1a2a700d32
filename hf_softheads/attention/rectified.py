"""Rectified softmax: softmax over the keys with a positive score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, softmax
from hf_softheads.attention.call import Inputs, Params, RowMap, ScoreForm


@dataclass(frozen=True)
class Rectified(AttentionSpec, name="rectified"):
    """`w = [z ≥ 0] exp(z) / Σ [z ≥ 0] exp(z)`, 0 for a row of negative scores

    Source: arXiv:2504.20966 (the ancestor of softpick).
    """

    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True

    def row_map(self) -> RowMap:
        return RowMap("rectified")

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        return softmax(scores, keep & (scores >= 0))

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm:
        def log_weight(z: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(z >= 0, z, -torch.inf)

        return ScoreForm(log_weight)
