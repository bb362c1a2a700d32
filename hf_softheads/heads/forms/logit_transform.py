"""What a model family does to the scores after its head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """What a model family does to the scores after its head: `("div", s)`, `("mul", s)`, `("tanh", 1.0)` in order.

    Gemma's soft cap is `div, tanh, mul`; Granite divides, Cohere multiplies.
    """

    steps: tuple[tuple[str, float], ...] = ()

    def __call__(self, scores: Tensor) -> Tensor:
        for operation, value in self.steps:
            if operation == "tanh":
                scores = torch.tanh(scores)
            else:
                scores = scores / value if operation == "div" else scores * value
        return scores

    @property
    def scale(self) -> float | None:
        """The factor when the transform only scales, else None."""
        factor = 1.0
        for operation, value in self.steps:
            if operation == "tanh":
                return None
            factor *= 1 / value if operation == "div" else value
        return factor

    @property
    def rises(self) -> bool:
        """Whether a larger score is a larger logit, as every head assumes that looks for its best tokens."""
        return math.prod(value for _, value in self.steps) > 0
