"""Logistic loss against sampled negatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_softheads.losses.base import SampledLoss
from hf_softheads.losses.sampled_softmax import Distribution, draw
from hf_softheads.registry import Count


@dataclass(frozen=True)
class NegativeSampling(SampledLoss, name="negative_sampling"):
    """`−log σ(z_y) − Σ_{v ∈ S} log σ(−z_v)`, samples equal to the label removed.

    Mikolov et al., 1310.4546 eq. 4. Not normalised and no density: for representations, or a screen.
    """

    samples: Count = 64
    distribution: Distribution = "log_uniform"

    def candidates(self, labels: Tensor, vocab: int) -> Tensor:
        return draw(self.samples, vocab, self.distribution, labels.device)

    def from_candidates(
        self, target: Tensor, others: Tensor, ids: Tensor, labels: Tensor, vocab: int
    ) -> Tensor:
        wrong = F.softplus(others).masked_fill(ids == labels.unsqueeze(-1), 0.0)
        return F.softplus(-target) + wrong.sum(-1)
