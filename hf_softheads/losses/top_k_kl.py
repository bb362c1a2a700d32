"""Forward Kullback–Leibler divergence on the teacher's best tokens and one bucket for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, with_teacher
from hf_softheads.registry import Count


@dataclass(frozen=True)
class TopKKL(LossSpec, name="top_k_kl"):
    """`Σ_{v ∈ K} t_v log(t_v / s_v) + t_rest log(t_rest / s_rest)`, K the teacher's k best tokens.

    What a stored teacher of k numbers per token can give. A lower bound of the full KL; without the bucket the student
    would become over-confident.
    """

    k: Count = 64

    needs_teacher: ClassVar[bool] = True

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        teacher = with_teacher(self, teacher)
        k = min(self.k, logits.shape[-1])
        ids = teacher.topk(k, -1).indices
        t, s = _with_rest(teacher, ids), _with_rest(logits, ids)
        if k == logits.shape[-1]:
            t, s = t[:, :k], s[:, :k]  # nothing is left for the bucket
        return (t.exp() * (t - s)).sum(-1)


def _with_rest(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens `ids (N, k)` and of all the others together, `(N, k + 1)`."""
    rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), rest], -1).log_softmax(-1)
