"""Learned sinks: every head has one logit that takes weight and gives nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, lowered, per_head
from hf_softheads.attention.call import Geometry, Inputs, Params, ScoreForm


@dataclass(frozen=True)
class LearnedSink(AttentionSpec, name="learned_sink"):
    """`w = exp(z) / (exp(S_h) + Σ exp(z))`, S one learned logit per head

    Source: gpt-oss, openai/gpt-oss `torch/model.py::sdpa`. `S = -10` is the identity to 5e-5 for scores around 0.

    Args:
        start: S at the start.
    """

    start: float = -10.0
    sums_to_one: ClassVar[bool] = False
    training_free: ClassVar[bool] = True
    takes_sinks: ClassVar[bool] = True

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`sinks (H,)`."""
        return {"sinks": torch.full((geometry.heads,), float(self.start))}

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        return sink_softmax(scores, keep, per_head(params["sinks"]))

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm:
        sinks = params["sinks"].view(1, -1, 1)
        return ScoreForm(factor=lambda lse: (lse - sinks).sigmoid())

    def sink_logits(self, inputs: Inputs, params: Params) -> Tensor:
        return params["sinks"]


def sink_softmax(scores: Tensor, keep: Tensor, sink: Tensor) -> Tensor:
    """Softmax over the kept keys and one more of score `sink`, whose column is dropped."""
    sink = sink.to(scores.dtype)
    scores = lowered(scores, keep)
    top = torch.maximum(scores.detach().amax(-1, keepdim=True), sink.detach())
    raised = (scores - top).exp() * keep
    return raised / (raised.sum(-1, keepdim=True) + (sink - top).exp())
