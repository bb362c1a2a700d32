"""Cross-entropy, the loss of language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.losses.base import LogitStatistic, SummaryLoss


@dataclass(frozen=True)
class CrossEntropy(SummaryLoss, name="cross_entropy"):
    """`-log softmax(z)[y]`, `F.cross_entropy(z, y, reduction="none")`, in nats."""

    needs: ClassVar[tuple[LogitStatistic, ...]] = ("log_prob",)

    def from_summary(self, numbers: Mapping[LogitStatistic, Tensor]) -> Tensor:
        return -numbers["log_prob"]
