"""Adaptive Kullback–Leibler divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, kl_divergence, with_teacher
from hf_softheads.registry import Bounds


@dataclass(frozen=True)
class AKL(LossSpec, name="akl"):
    """`w KL(t‖s) + (1−w) KL(s‖t)`, where w is the share of `Σ|t − s|` that lies in the teacher's head.

    Wu et al., 2404.02657. The head is the shortest list of the teacher's best tokens before which less than `mass` has
    gathered; the weights carry no gradient. Forward KL fits the head first, reverse KL the tail.
    """

    mass: Annotated[float, Bounds(above=0, below=1)] = 0.5

    needs_teacher: ClassVar[bool] = True

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        t = with_teacher(self, teacher).log_softmax(-1)
        s = logits.log_softmax(-1)
        with torch.no_grad():
            p, order = t.exp().sort(-1, descending=True)
            in_head = p.cumsum(-1) - p < self.mass
            gap = (t.exp() - s.exp()).abs().gather(-1, order)
            w = (gap * in_head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
        return w * kl_divergence(t, s) + (1 - w) * kl_divergence(s, t)
