"""Sigmoid attention: every weight on its own, no normalisation over the row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, lowered
from hf_softheads.attention.call import Inputs, Params, RowMap, ScoreForm, per_row, visible_keys


@dataclass(frozen=True)
class Sigmoid(AttentionSpec, name="sigmoid"):
    """`w = σ(z + b)`, divided by 1, √n or n

    Source: arXiv:2409.04431. The paper recommends the constant `bias = -log(training length)`.

    Args:
        bias: b, a constant.
        row_bias: added to b in every row. `"log_n"`: `-log n`, n the keys that the row sees; `"lse"`: `-log Σ exp(z)`,
            with which a pretrained softmax model starts close to itself (`σ(z - lse) ≈ p` for small p).
        divide: what the weights are divided by: nothing, `√n`, `n` or their own `sum`.
        alibi: add `slope_h · (n - m)` to the scores, with the slopes `2^(-8h/H)` of ALiBi.
    """

    bias: float = 0.0
    row_bias: Literal["none", "log_n", "lse"] = "none"
    divide: Literal["none", "sqrt_n", "n", "sum"] = "none"
    alibi: bool = False
    sums_to_one: ClassVar[bool] = False
    sinks: ClassVar[bool] = False

    def row_map(self) -> RowMap:
        row_bias = float(self.row_bias == "log_n")
        divide = {"none": (0.0, 1.0), "sqrt_n": (1.0, 0.5), "n": (1.0, 1.0), "sum": (2.0, 1e-8)}
        name = "sigmoid_shifted" if self.row_bias == "lse" else "sigmoid"
        return RowMap(name, (*divide[self.divide], self.bias, row_bias))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        return self._divided(self._logits(scores, keep).sigmoid_(), keep)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self.divide == "sum" or self.row_bias == "lse":
            return super().weights_vjp(scores, keep, params, grad)
        weights = self._logits(scores, keep).sigmoid_()
        grad = self._divided(torch.ops.aten.sigmoid_backward(grad, weights), keep)
        return self._divided(weights, keep), grad, {}

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        if self.alibi:
            heads = inputs.query.shape[1]
            exponents = torch.arange(1, heads + 1, device=inputs.query.device) * (8 / heads)
            inputs = inputs.replace(slopes=-(2.0**-exponents))
        return super().forward(inputs, params)

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm | None:
        if self.row_bias == "lse":
            return None
        n = visible_keys(inputs)
        row_bias = -n.log() if self.row_bias == "log_n" else torch.zeros_like(n)
        bias = per_row(inputs, row_bias + self.bias)

        def log_weight(z: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return F.logsigmoid(z + bias[b, h, q])

        factors = {
            "none": torch.exp,
            "sqrt_n": lambda lse: lse.exp() / n.sqrt(),
            "n": lambda lse: lse.exp() / n,
            "sum": lambda lse: (lse - math.log(1e-8)).sigmoid(),
        }
        return ScoreForm(log_weight, factors[self.divide])

    def _logits(self, scores: Tensor, keep: Tensor) -> Tensor:
        """`z + b`, and `-inf`, of which the sigmoid is exactly 0, where `~keep`."""
        bias = torch.full_like(keep, self.bias, dtype=scores.dtype).masked_fill_(~keep, -torch.inf)
        if self.row_bias == "log_n":
            bias -= keep.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype).log()
        logits = scores + bias
        if self.row_bias == "lse":
            logits = logits - lowered(scores, keep).logsumexp(-1, keepdim=True)
        return logits

    def _divided(self, weights: Tensor, keep: Tensor) -> Tensor:
        if self.divide == "none":
            return weights
        if self.divide == "sum":
            return weights / (weights.sum(-1, keepdim=True) + 1e-8)
        n = keep.sum(-1, keepdim=True).clamp(min=1).to(weights.dtype)
        return weights / (n.sqrt() if self.divide == "sqrt_n" else n)
