"""PaLM's auxiliary loss, which keeps the log-partition near zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.losses.base import LogitStatistic, SummaryLoss


@dataclass(frozen=True)
class ZLoss(SummaryLoss, name="z_loss"):
    """`(log Σ_v e^{z_v})²`, to be added to a likelihood with a weight near 1e-4.

    PaLM, 2204.02311 §5. A log-partition near zero keeps bf16 logits precise and makes the head self-normalised.
    """

    needs: ClassVar[tuple[LogitStatistic, ...]] = ("logsumexp",)

    def from_summary(self, numbers: Mapping[LogitStatistic, Tensor]) -> Tensor:
        return numbers["logsumexp"].square()
