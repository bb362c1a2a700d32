"""The multi-class hinge loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_softheads.losses.base import LossSpec, check_positive, pick


@dataclass(frozen=True)
class MultiMargin(LossSpec, name="multi_margin"):
    """`Σ_{v ≠ y} max(0, margin − z_y + z_v)^power / V`, `F.multi_margin_loss(z, y, p=power, margin=margin)`.

    Crammer & Singer's support vector machine, averaged over the vocabulary as torch does. No density.
    """

    margin: float = 1.0
    power: int = 1

    def __post_init__(self) -> None:
        check_positive("multi_margin", margin=self.margin)
        if self.power not in (1, 2):
            raise ValueError(f"multi_margin.power must be 1 or 2, got {self.power}")

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        excess = (self.margin - pick(logits, labels).unsqueeze(-1) + logits).clamp_min(0)
        own = self.margin**self.power
        return (excess.pow(self.power).sum(-1) - own) / logits.shape[-1]
