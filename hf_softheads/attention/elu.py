"""ELU attention: positive weights without an exponential tail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, Params, RowMap, ScoreForm
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class ELU(AttentionSpec, name="elu"):
    """`w = elu(z) + 1`, divided by `Σ w + ε` or not

    Source: arXiv:2410.10781. With `features` the map is on both sides of the product, as in linear
    attention: `w = scaling · (elu(q) + 1) · (elu(k) + 1)`.

    Args:
        normalised: divide by the row's sum; without it the sink disappears.
        features: map queries and keys instead of scores.
        eps: ε.
    """

    normalised: bool = True
    features: bool = False
    eps: Positive = 1e-8
    sums_to_one: ClassVar[bool] = False

    def row_map(self) -> RowMap | None:
        if self.features:
            return None
        return RowMap("elu", (2.0, self.eps) if self.normalised else (0.0, 1.0))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        raised = (scores if self.features else _raised(scores)) * keep
        return raised / (raised.sum(-1, keepdim=True) + self.eps) if self.normalised else raised

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm:
        features, eps = self.features, self.eps

        def log_weight(z: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            if features:
                return z.log()
            return torch.where(z > 0, z.clamp(min=0).log1p(), z)

        if not self.normalised:
            return ScoreForm(log_weight, torch.exp)
        return ScoreForm(log_weight, lambda lse: (lse - math.log(eps)).sigmoid())

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        if self.features:
            query, key = (
                _raised(x if x.element_size() > 4 else x.float())
                for x in (inputs.query, inputs.key)
            )
            inputs = inputs.replace(query=query, key=key)
        return super().forward(inputs, params)


def _raised(x: Tensor) -> Tensor:
    """`elu(x) + 1`, without the rounding of `exp(x) - 1 + 1`."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
