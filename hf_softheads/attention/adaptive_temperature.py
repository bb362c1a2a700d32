"""Adaptive temperature: sharpen a row's softmax by a polynomial of its entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, softmax
from hf_softheads.attention.call import Params, RowMap
from hf_softheads.registry import NotNegative


@dataclass(frozen=True)
class AdaptiveTemperature(AttentionSpec, name="adaptive_temperature"):
    """`softmax(β · z)`, `β = max(1, poly(H))` where `H > 0.5` nats, else 1; H the entropy of `softmax(z)`

    Source: arXiv:2410.01104. The published polynomial exceeds 1 only for `0.85 < H < 5.94`: a
    row that spreads over more than 380 keys is left as it is.

    Args:
        polynomial: coefficients of β in H, highest power first.
        gate: the entropy in nats below which rows are left as they are.
        long: a second polynomial, used from the entropy `long_from` on; empty: the first one everywhere. `refit()`
            has one that was measured.
        long_from: nats.
        train_through: let the gradient flow through β.
    """

    polynomial: tuple[float, ...] = (-0.037, 0.481, -2.3, 4.917, -1.791)
    gate: NotNegative = 0.5
    long: tuple[float, ...] = ()
    long_from: NotNegative = 4.4
    train_through: bool = True

    @classmethod
    def refit(cls, **fields: Any) -> AdaptiveTemperature:
        """The published polynomial up to its maximum, 2.42 at 4.4 nats, and from there a line measured by this project
        with the paper's procedure on rows of up to a million keys: β falls to 1 at 7.6 nats instead of 5.94; in flatter
        rows no β gains anything. `benchmarks/adaptive_temperature.py` finds it."""
        return cls(**{"long": (-0.445, 4.38), "long_from": 4.4, **fields})

    def __post_init__(self) -> None:
        if not self.polynomial:
            raise ValueError("polynomial needs at least one coefficient")

    def row_map(self) -> RowMap:
        sizes = (float(len(self.polynomial)), float(len(self.long)))
        settings = (self.gate, self.long_from, float(self.train_through), *sizes)
        return RowMap("adaptive_temperature", (*settings, *self.polynomial, *self.long))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        probabilities = softmax(scores, keep)
        entropy = -(probabilities * (probabilities + 1e-9).log()).sum(-1, keepdim=True)
        factor = self.factor(entropy)
        return softmax(scores * (factor if self.train_through else factor.detach()), keep)

    def factor(self, entropy: Tensor) -> Tensor:
        """β of each entropy in nats."""
        factor = _polynomial(self.polynomial, entropy)
        if self.long:
            factor = torch.where(entropy < self.long_from, factor, _polynomial(self.long, entropy))
        return torch.where(entropy > self.gate, factor.clamp(min=1), 1)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for coefficient in coefficients:
        total = total * x + coefficient
    return total
