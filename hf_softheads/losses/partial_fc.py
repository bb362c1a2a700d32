"""Margin softmax over the batch's labels and a random part of the other tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from hf_softheads.losses.base import SampledLoss
from hf_softheads.registry import Bounds, NotNegative, Positive


@dataclass(frozen=True)
class PartialFC(SampledLoss, name="partial_fc"):
    """Cross-entropy of `scale · cos θ_v`, the label at `scale · cos(θ_y + margin)`, over a part of the vocabulary.

    An et al., 2203.15565, with ArcFace's margin (1801.07698). The part is the labels of the batch and random others up
    to `rate · V`. The logits are cosines between hidden states and rows, which the Objective computes for a dense
    head. No correction for the sampling: biased, for contrastive heads only.
    """

    rate: Annotated[float, Bounds(above=0, at_most=1)] = 0.1
    margin: NotNegative = 0.5
    scale: Positive = 64.0

    cosine: ClassVar[bool] = True

    def candidates(self, labels: Tensor, vocab: int) -> Tensor:
        order = torch.rand(vocab, device=labels.device)
        order[labels] = 2.0  # the batch's labels come first
        present = int((order == 2.0).sum())
        return order.topk(max(present, round(self.rate * vocab))).indices

    def from_candidates(
        self, target: Tensor, others: Tensor, ids: Tensor, labels: Tensor, vocab: int
    ) -> Tensor:
        cosine = target.clamp(-1, 1)
        sine = (1 - cosine.square()).clamp_min(1e-12).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        # past θ = π − margin the cosine would rise again; ArcFace continues it with a straight line there
        beyond = cosine <= -math.cos(self.margin)
        shifted = torch.where(beyond, cosine - self.margin * math.sin(self.margin), shifted)
        own = self.scale * shifted
        rest = (self.scale * others.clamp(-1, 1)).masked_fill(
            ids == labels.unsqueeze(-1), -torch.inf
        )
        return torch.logaddexp(rest.logsumexp(-1), own) - own
