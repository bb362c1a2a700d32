"""Cross-entropy against sampled negatives, for vocabularies of millions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_softheads.losses.base import SampledLoss
from hf_softheads.registry import Count

Distribution = Literal["log_uniform", "uniform"]


@dataclass(frozen=True)
class SampledSoftmax(SampledLoss, name="sampled_softmax"):
    """Cross-entropy over `{y} ∪ S` with logits `z_v − log Q(v)`, Q(v) the expected count of v among the S samples.

    Jean et al., 1412.2007; TensorFlow's `sampled_softmax_loss`. Samples equal to the label are removed. `log_uniform`
    expects ids sorted by frequency, as most tokenizers' nearly are. Biased for finite S; under about a million tokens
    the exact cross-entropy is the better choice.
    """

    samples: Count = 4096
    distribution: Distribution = "log_uniform"

    def candidates(self, labels: Tensor, vocab: int) -> Tensor:
        return draw(self.samples, vocab, self.distribution, labels.device)

    def from_candidates(
        self, target: Tensor, others: Tensor, ids: Tensor, labels: Tensor, vocab: int
    ) -> Tensor:
        others = others - (math.log(self.samples) + log_chance(ids, vocab, self.distribution))
        own = target - (math.log(self.samples) + log_chance(labels, vocab, self.distribution))
        others = others.masked_fill(ids == labels.unsqueeze(-1), -torch.inf)
        return torch.logaddexp(others.logsumexp(-1), own) - own


def draw(samples: int, vocab: int, distribution: Distribution, device: torch.device) -> Tensor:
    """Token ids `(samples,)`, with replacement."""
    u = torch.rand(samples, device=device, dtype=torch.float64)
    if distribution == "uniform":
        return (u * vocab).long().clamp_max(vocab - 1)
    return (u * math.log(vocab + 1)).expm1().long().clamp_max(vocab - 1)


def log_chance(ids: Tensor, vocab: int, distribution: Distribution) -> Tensor:
    """`log q(v)` of one draw: `1/V`, or `log(1 + 1/(v+1)) / log(V+1)`."""
    if distribution == "uniform":
        return torch.full(ids.shape, -math.log(vocab), device=ids.device)
    return (1 / (ids + 1.0)).log1p().log() - math.log(math.log(vocab + 1))
