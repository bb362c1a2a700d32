"""ReLU attention: rectified scores, divided by the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, Params, RowMap, ScoreForm, visible_keys
from hf_softheads.registry import Count


@dataclass(frozen=True)
class ReLU(AttentionSpec, name="relu"):
    """`w = relu(z)^power / n`, n the number of keys that the row sees

    Source: arXiv:2309.08586 (power 1), arXiv:2109.08668 (power 2).

    Args:
        power: 1 or 2.
        divide: by `"n"`, by the constant `"length"`, or `"none"`.
        length: L of `divide="length"`.
    """

    power: Literal[1, 2] = 1
    divide: Literal["n", "length", "none"] = "n"
    length: Count = 2048
    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True
    sinks: ClassVar[bool] = False

    def row_map(self) -> RowMap:
        divide = {"none": (0.0, 1.0), "length": (0.0, float(self.length)), "n": (1.0, 1.0)}
        return RowMap("relu_squared" if self.power == 2 else "relu", divide[self.divide])

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        rectified = scores.relu()
        return (rectified.square() if self.power == 2 else rectified) * self._factor(scores, keep)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rectified, factor = scores.relu(), self._factor(scores, keep)
        if self.power == 2:
            return rectified.square() * factor, rectified.mul_(2 * factor).mul_(grad), {}
        return rectified * factor, (grad * factor).mul_(rectified > 0), {}

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm:
        squared = self.power == 2

        def log_weight(z: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            raised = torch.where(z > 0, z, 1.0).log()
            return torch.where(z > 0, 2 * raised if squared else raised, -torch.inf)

        n = visible_keys(inputs)
        divisors = {"n": n, "length": n.new_tensor(self.length), "none": n.new_ones(())}
        return ScoreForm(log_weight, lambda lse: lse.exp() / divisors[self.divide])

    def _factor(self, scores: Tensor, keep: Tensor) -> Tensor:
        """1 over the divisor, 0 where `~keep`."""
        kept = keep.to(scores.dtype)
        if self.divide == "none":
            return kept
        return kept / (self.length if self.divide == "length" else kept.sum(-1, True).clamp(min=1))
