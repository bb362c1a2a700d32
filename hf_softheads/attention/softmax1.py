"""Softmax-off-by-one: a row may attend to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, Params, RowMap, ScoreForm
from hf_softheads.attention.learned_sink import sink_softmax


@dataclass(frozen=True)
class Softmax1(AttentionSpec, name="softmax1"):
    """`w = exp(z) / (1 + Σ exp(z))`

    Source: Evan Miller, "Attention is off by one", 2023: a learned sink whose logit is 0 and stays there.
    """

    sums_to_one: ClassVar[bool] = False

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        return sink_softmax(scores, keep, torch.zeros((), device=scores.device))

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm:
        return ScoreForm(factor=torch.sigmoid)

    def row_map(self) -> RowMap:
        return RowMap("softmax1")

    def sink_logits(self, inputs: Inputs, params: Params) -> Tensor:
        return torch.zeros(inputs.query.shape[1], device=inputs.query.device)
