"""Length-scaled softplus attention: cosine scores, softplus instead of exp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, Params, RowMap, ScoreForm, per_row, visible_keys
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class LSSA(AttentionSpec, name="lssa"):
    """`a = softplus(log D · log n · cos(q, k))`, `w = a / (Σ a + ε)`

    Source: arXiv:2501.13428. The scores are cosines: `scaling` is not used.

    Args:
        eps: ε; the paper gives none.
    """

    eps: Positive = 1e-8

    def row_map(self) -> RowMap:
        return RowMap("softplus", (2.0, self.eps))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        n = keep.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
        raised = F.softplus(scores * n.log()) * keep
        return raised / (raised.sum(-1, keepdim=True) + self.eps)

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm | None:
        growth = per_row(inputs, visible_keys(inputs).log())
        eps = self.eps

        def log_weight(z: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return F.softplus(z * growth[b, h, q]).log()

        return ScoreForm(log_weight, lambda lse: (lse - math.log(eps)).sigmoid())

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        query, key = unit(inputs.query), unit(inputs.key)
        cosines = inputs.replace(query=query, key=key, scaling=math.log(query.shape[-1]))
        return super().forward(cosines, params)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, fp32; a row of zeros stays."""
    return F.normalize(x if x.element_size() > 4 else x.float(), dim=-1)
