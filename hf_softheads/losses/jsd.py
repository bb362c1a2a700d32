"""Generalised Jensen–Shannon divergence between teacher and student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from hf_softheads.losses.base import DivergenceLoss, Probabilities
from hf_softheads.registry import Bounds, Positive


@dataclass(frozen=True)
class JSD(DivergenceLoss, name="jsd"):
    """`τ² (β KL(t‖m) + (1−β) KL(s‖m))` with `m = β t + (1−β) s`: bounded, between forward and reverse KL.

    GKD, 2306.13649. Divided by β it tends to the forward KL for β → 0.
    """

    beta: Annotated[float, Bounds(above=0, below=1, hint="the ends are kl and reverse_kl")] = 0.5
    temperature: Positive = 1.0

    def terms(self, s: Probabilities, t: Probabilities) -> tuple[Tensor, ...]:
        m = self._log_mixture(s, t)
        return t.p * (t.log - m), s.p * (s.log - m)

    def from_sums(self, sums: tuple[Tensor, ...]) -> Tensor:
        return self.beta * sums[0] + (1 - self.beta) * sums[1]

    def gradient(self, s: Probabilities, t: Probabilities, sums: tuple[Tensor, ...]) -> Tensor:
        return (1 - self.beta) * s.p * (s.log - self._log_mixture(s, t) - sums[1])

    def _log_mixture(self, s: Probabilities, t: Probabilities) -> Tensor:
        return torch.logaddexp(t.log + math.log(self.beta), s.log + math.log(1 - self.beta))
