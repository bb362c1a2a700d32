"""Reverse Kullback–Leibler divergence to the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.losses.base import LossSpec, kl_divergence, with_teacher
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class ReverseKL(LossSpec, name="reverse_kl"):
    """`τ² Σ_v s_v log(s_v / t_v)` with `t, s = softmax(teacher / τ), softmax(student / τ)`.

    MiniLLM, 2306.08543. It avoids what the teacher finds unlikely, at the price of covering less of its mass.
    """

    temperature: Positive = 1.0

    needs_teacher: ClassVar[bool] = True

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        t = (with_teacher(self, teacher) / self.temperature).log_softmax(-1)
        s = (logits / self.temperature).log_softmax(-1)
        return kl_divergence(s, t) * self.temperature**2
