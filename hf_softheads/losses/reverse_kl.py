"""Reverse Kullback–Leibler divergence to the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.losses.base import Divergence, DivergenceLoss, Probabilities
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class ReverseKL(DivergenceLoss, name="reverse_kl"):
    """`τ² Σ_v s_v log(s_v / t_v)` with `t, s = softmax(teacher / τ), softmax(student / τ)`.

    MiniLLM, 2306.08543. It avoids what the teacher finds unlikely, at the price of covering less of its mass.
    """

    temperature: Positive = 1.0

    equals: ClassVar[Divergence | None] = "reverse"

    def terms(self, s: Probabilities, t: Probabilities) -> tuple[Tensor, ...]:
        return (s.p * (s.log - t.log),)

    def gradient(self, s: Probabilities, t: Probabilities, sums: tuple[Tensor, ...]) -> Tensor:
        return s.p * (s.log - t.log - sums[0])
