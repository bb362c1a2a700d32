"""ReLU attention: rectified scores, divided by the length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, Params


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
    length: int = 2048
    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True
    sinks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power}")
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        rectified = scores.relu().masked_fill(~keep, 0)
        return self._divided(rectified.square() if self.power == 2 else rectified, keep)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rectified = scores.relu().masked_fill_(~keep, 0)
        if self.power == 2:
            slope = self._divided(rectified * 2, keep)
            return self._divided(rectified.square_(), keep), slope.mul_(grad), {}
        slope = self._divided((rectified > 0).to(grad.dtype), keep)
        return self._divided(rectified, keep), slope.mul_(grad), {}

    def _divided(self, weights: Tensor, keep: Tensor) -> Tensor:
        if self.divide == "none":
            return weights
        if self.divide == "length":
            return weights / self.length
        return weights / keep.sum(-1, keepdim=True).clamp(min=1).to(weights.dtype)
