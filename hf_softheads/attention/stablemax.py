"""StableMax: a softmax with a piecewise rational instead of the exponential."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, Params, RowMap, ScoreForm


@dataclass(frozen=True)
class StableMax(AttentionSpec, name="stablemax"):
    """`w = s(z) / Σ s(z)`, `s(z) = z + 1` for `z ≥ 0`, else `1 / (1 - z)`

    Source: arXiv:2501.04697. The gradient is finite everywhere; the authors' code gives NaN at z = 1.
    """

    def row_map(self) -> RowMap:
        return RowMap("stablemax", (2.0, 0.0))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        raised = s(scores) * keep
        total = raised.sum(-1, keepdim=True)
        return raised / total.masked_fill(total == 0, 1)

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm:
        def log_weight(z: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return z.sign() * z.abs().log1p()

        return ScoreForm(log_weight)


def s(z: Tensor) -> Tensor:
    """`z + 1` for `z ≥ 0`, else `1 / (1 - z)`."""
    return torch.where(z >= 0, z + 1, 1 / (1 - z.clamp(max=0)))
