"""Cross-entropy against a smoothed target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from hf_softheads.losses.base import LogitStatistic, SummaryLoss
from hf_softheads.registry import Bounds


@dataclass(frozen=True)
class LabelSmoothing(SummaryLoss, name="label_smoothing"):
    """`-(1-α) log p_y - (α/V) Σ_v log p_v`, `F.cross_entropy(z, y, label_smoothing=α)`.

    Szegedy et al., 1512.00567 §7. It contains the cross-entropy; do not add that again. Smoothing worsens the
    ranking of predictions by confidence.
    """

    alpha: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.1

    needs: ClassVar[tuple[LogitStatistic, ...]] = ("log_prob", "logsumexp", "mean")

    def from_summary(self, numbers: Mapping[LogitStatistic, Tensor]) -> Tensor:
        uniform = numbers["logsumexp"] - numbers["mean"]
        return -(1 - self.alpha) * numbers["log_prob"] + self.alpha * uniform
