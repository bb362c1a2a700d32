"""Forward Kullback–Leibler divergence from the teacher, the standard distillation loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.losses.base import LossSpec, check_positive, kl_divergence, with_teacher


@dataclass(frozen=True)
class KL(LossSpec, name="kl"):
    """`τ² Σ_v t_v log(t_v / s_v)` with `t, s = softmax(teacher / τ), softmax(student / τ)`; gradient `τ (s − t)`.

    Hinton et al., 1503.02531. It covers all of the teacher's mass, so it is the one to minimise for perplexity.
    """

    temperature: float = 1.0

    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("kl", temperature=self.temperature)

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        t = (with_teacher(self, teacher) / self.temperature).log_softmax(-1)
        s = (logits / self.temperature).log_softmax(-1)
        return kl_divergence(t, s) * self.temperature**2
