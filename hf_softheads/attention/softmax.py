"""The softmax itself, as a variant: the control that proves that the plumbing changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_softheads.attention.base import AttentionSpec


@dataclass(frozen=True)
class Softmax(AttentionSpec, name="softmax"):
    """`w = exp(z) / Σ exp(z)`

    Source: arXiv:1706.03762, eq. 1.
    """

    training_free: ClassVar[bool] = True
