"""Cross-entropy of several right answers that do not compete with each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec


@dataclass(frozen=True)
class DecoupledSoftmax(LossSpec, name="decoupled_softmax"):
    """`−(1/|P|) Σ_{c ∈ P} log( e^{z_c} / (e^{z_c} + Σ_{v ∉ P} e^{z_v}) )` over the set P of right tokens.

    DEXML, 2310.10636. `labels`: `(N,)`, or `(N, P)` filled up with negative numbers. One label: cross-entropy.
    """

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        chosen = labels if labels.ndim == 2 else labels.unsqueeze(-1)
        given = chosen >= 0
        # a filler points at the first label, which is always given
        ids = torch.where(given, chosen, chosen[:, :1])
        negatives = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        picked = logits.gather(-1, ids)
        each = torch.logaddexp(picked, negatives) - picked
        return (each * given).sum(-1) / given.sum(-1)
