"""Plackett–Luce distillation: learn the teacher's ranking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, with_teacher
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class PLD(LossSpec, name="pld"):
    """`Σ_k q_{π_k} (log Σ_{l≥k} e^{z_{π_l}} − z_{π_k})`, π: label, then teacher's order; `q = softmax(teacher / τ)`.

    2506.12542. The likelihood of the teacher's ranking, each choice weighted by the teacher's probability; with all
    weight on the first choice it is cross-entropy. Ranked are the first `k` choices; the others count in every sum.
    """

    temperature: Positive = 1.0
    k: Count = 1024

    needs_teacher: ClassVar[bool] = True

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        teacher = with_teacher(self, teacher)
        first = teacher.scatter(-1, labels.unsqueeze(-1), torch.inf)
        order = first.topk(min(self.k, logits.shape[-1]), -1).indices
        q = (teacher / self.temperature).softmax(-1).gather(-1, order)
        ranked = logits.gather(-1, order)
        tail = logits.scatter(-1, order, -torch.inf).logsumexp(-1, keepdim=True)
        # from the last choice to the first: the tail, then one choice more each time
        behind = torch.cat([tail, ranked.flip(-1)], -1).logcumsumexp(-1)[:, 1:].flip(-1)
        return (q * (behind - ranked)).sum(-1)
