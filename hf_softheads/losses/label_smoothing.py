"""Cross-entropy against a smoothed target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.losses.base import LogitStatistic, SummaryLoss


@dataclass(frozen=True)
class LabelSmoothing(SummaryLoss, name="label_smoothing"):
    """`-(1-α) log p_y - (α/V) Σ_v log p_v`, `F.cross_entropy(z, y, label_smoothing=α)`.

    Szegedy et al., 1512.00567 §7. It contains the cross-entropy; do not add that again. Smoothing worsens the
    ranking of predictions by confidence.
    """

    alpha: float = 0.1

    needs: ClassVar[tuple[LogitStatistic, ...]] = ("log_prob", "logsumexp", "mean")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"label_smoothing.alpha must be between 0 and 1, got {self.alpha}")

    def from_summary(self, numbers: Mapping[LogitStatistic, Tensor]) -> Tensor:
        uniform = numbers["logsumexp"] - numbers["mean"]
        return -(1 - self.alpha) * numbers["log_prob"] + self.alpha * uniform
