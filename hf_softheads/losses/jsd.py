"""Generalised Jensen–Shannon divergence between teacher and student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, kl_divergence, with_teacher
from hf_softheads.registry import Bounds, Positive


@dataclass(frozen=True)
class JSD(LossSpec, name="jsd"):
    """`τ² (β KL(t‖m) + (1−β) KL(s‖m))` with `m = β t + (1−β) s`: bounded, between forward and reverse KL.

    GKD, 2306.13649. Divided by β it tends to the forward KL for β → 0.
    """

    beta: Annotated[float, Bounds(above=0, below=1, hint="the ends are kl and reverse_kl")] = 0.5
    temperature: Positive = 1.0

    needs_teacher: ClassVar[bool] = True

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        t = (with_teacher(self, teacher) / self.temperature).log_softmax(-1)
        s = (logits / self.temperature).log_softmax(-1)
        m = torch.logaddexp(t + math.log(self.beta), s + math.log(1 - self.beta))
        divergence = self.beta * kl_divergence(t, m) + (1 - self.beta) * kl_divergence(s, m)
        return divergence * self.temperature**2
