"""The Z-loss of the spherical family: a loss whose cost does not depend on the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from hf_softheads.losses.base import LogitStatistic, SummaryLoss
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class SphericalZ(SummaryLoss, name="spherical_z"):
    """`(1/a) log(1 + exp(a (b − c)))` with `c = (z_y − mean z) / std z`: how far the label stands out.

    de Brébisson & Vincent, 1604.08859. Invariant under `z → s·z + t`, so it is no density: refit a temperature
    afterwards, or add it to a likelihood. It needs only z_y, Σz and Σz²; on a dense head the Objective takes the last
    two from `Σw` and `WᵀW` (1412.7091), `O(N D²)` instead of `O(N V D)`.
    """

    a: Positive = 1.0
    b: float = 0.0

    needs: ClassVar[tuple[LogitStatistic, ...]] = ("target", "mean", "mean_square")

    def from_summary(self, numbers: Mapping[LogitStatistic, Tensor]) -> Tensor:
        mean = numbers["mean"]
        variance = (numbers["mean_square"] - mean.square()).clamp_min(1e-12)
        standard = (numbers["target"] - mean) * variance.rsqrt()
        return F.softplus(self.a * (self.b - standard)) / self.a
