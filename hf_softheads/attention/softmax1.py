"""Softmax-off-by-one: a row may attend to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention import flex, fused, native
from hf_softheads.attention.base import AttentionSpec, Inputs, Params
from hf_softheads.attention.learned_sink import sink_softmax
from hf_softheads.attention.native import RowMap


@dataclass(frozen=True)
class Softmax1(AttentionSpec, name="softmax1"):
    """`w = exp(z) / (1 + Σ exp(z))`

    Source: Evan Miller, "Attention is off by one", 2023: a learned sink whose logit is 0 and stays there.
    """

    sums_to_one: ClassVar[bool] = False

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        return sink_softmax(scores, keep, torch.zeros((), device=scores.device))

    def flex_form(self, inputs: Inputs, params: Params) -> flex.Form:
        return flex.Form(factor=torch.sigmoid)

    def row_map(self) -> RowMap:
        return RowMap("softmax1")

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        if not native.possible(inputs) and fused.sinks_possible(inputs):
            zeros = torch.zeros(inputs.query.shape[1], device=inputs.query.device)
            return fused.attend_with_sinks(inputs, zeros)
        return super().forward(inputs, params)

    def path(self) -> str:
        return native.path(fused.SINKS)
