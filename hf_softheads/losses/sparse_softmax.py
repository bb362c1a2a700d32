"""Cross-entropy over the largest logits only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick
from hf_softheads.registry import Count


@dataclass(frozen=True)
class SparseSoftmax(LossSpec, name="sparse_softmax"):
    """`log Σ_{v ∈ top-k(z) ∪ {y}} e^{z_v} − z_y`: tokens outside the k best get no gradient.

    2112.12433. Zero once the label leads the k best; for fine-tuning only, it spoils calibration and perplexity.
    """

    k: Count = 10

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        values, ids = logits.topk(min(self.k, logits.shape[-1]), -1)
        target = pick(logits, labels)
        counted = (ids == labels.unsqueeze(-1)).any(-1)
        extra = target.masked_fill(counted, -torch.inf)
        return torch.cat([values, extra.unsqueeze(-1)], -1).logsumexp(-1) - target
