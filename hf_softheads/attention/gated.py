"""Gated attention: the output of every head times a sigmoid of the layer's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Geometry, Inputs, Params


@dataclass(frozen=True)
class Gated(AttentionSpec, name="gated"):
    """`σ(x W + b) · (softmax(z) @ v)`, x the layer's input

    Source: arXiv:2505.06708 (position G1). W starts at 0 and b at `start`, so that a pretrained model starts with
    all gates open at `σ(start)`.

    Args:
        per: one gate per `"channel"` of every head (the paper's best), or one per `"head"`.
        start: b at the start.
    """

    per: Literal["channel", "head"] = "channel"
    start: float = 6.0
    sums_to_one: ClassVar[bool] = False
    sinks: ClassVar[bool] = False
    training_free: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`W (H·D or H, hidden)` and `b (H·D or H,)`."""
        gates = geometry.heads * (geometry.head_dim if self.per == "channel" else 1)
        return {
            "W": torch.zeros(gates, geometry.hidden_size),
            "b": torch.full((gates,), float(self.start)),
        }

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        out = super().forward(inputs, params)
        if inputs.hidden is None:
            raise ValueError("gated reads the layer's input: pass hidden")
        x = inputs.hidden
        logits = F.linear(x, params["W"].to(x.dtype)).to(out.dtype) + params["b"].to(out.dtype)
        gates = logits.sigmoid().unflatten(-1, (inputs.query.shape[1], -1)).transpose(1, 2)
        gated: Tensor = out * gates
        return gated
