"""Cross-entropy with a polynomial instead of the exponential."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick


@dataclass(frozen=True)
class StableMax(LossSpec, name="stablemax"):
    """`log Σ_v s(z_v) − log s(z_y)` with `s(x) = x + 1` for `x ≥ 0`, `1 / (1 − x)` below; summed in float64.

    Prieto et al., 2501.04697. It cannot collapse to exactly 0 as fp32 softmax does, and its tail is polynomial:
    for models trained with it from the start, not for logits that were trained for the exponential.
    """

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        positive, negative = logits.clamp_min(0), logits.clamp_max(0)
        s = torch.where(logits >= 0, positive + 1, 1 / (1 - negative)).double()
        return (s.sum(-1).log() - pick(s, labels).log()).to(logits.dtype)
