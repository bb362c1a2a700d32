"""Normalised knowledge distillation: the label and the rest apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick, with_teacher
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class NKD(LossSpec, name="nkd"):
    """`−t_y log s_y − γ τ² Σ_{v ≠ y} t̂_v log ŝ_v`, with `t̂, ŝ` the softmax at temperature τ over all tokens but y.

    Yang et al., 2303.13005. The second sum is a cross-entropy, so its least value is the entropy of t̂, not 0.
    """

    gamma: Positive = 1.5
    temperature: Positive = 1.0

    needs_teacher: ClassVar[bool] = True

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        teacher = with_teacher(self, teacher)
        label = labels.unsqueeze(-1)
        own = pick(teacher.softmax(-1), labels) * (logits.logsumexp(-1) - pick(logits, labels))
        t = (teacher / self.temperature).scatter(-1, label, -torch.inf).softmax(-1)
        s = (logits / self.temperature).scatter(-1, label, -torch.inf)
        rest = s.logsumexp(-1) - (t * (s.scatter(-1, label, 0.0))).sum(-1)  # 0 · −inf is not 0
        return own + self.gamma * self.temperature**2 * rest
