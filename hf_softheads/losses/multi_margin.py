"""The multi-class hinge loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class MultiMargin(LossSpec, name="multi_margin"):
    """`Σ_{v ≠ y} max(0, margin − z_y + z_v)^power / V`, `F.multi_margin_loss(z, y, p=power, margin=margin)`.

    Crammer & Singer's support vector machine, averaged over the vocabulary as torch does. No density.
    """

    margin: Positive = 1.0
    power: Literal[1, 2] = 1

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        excess = (self.margin - pick(logits, labels).unsqueeze(-1) + logits).clamp_min(0)
        own = self.margin**self.power
        return (excess.pow(self.power).sum(-1) - own) / logits.shape[-1]
