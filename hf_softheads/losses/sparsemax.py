"""The Fenchel–Young loss of sparsemax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick


@dataclass(frozen=True)
class Sparsemax(LossSpec, name="sparsemax"):
    """`Ω(p) + ⟨p − e_y, z⟩`, `p = [z − τ]₊` on the simplex, `Ω(p) = (1 − ‖p‖²) / 2`; gradient `p − e_y`.

    Martins & Astudillo, 1602.02068; Fenchel–Young form 1901.02324. Exactly 0 once the label leads by a margin of 1.
    `-log p` is not defined for a label outside the support: judge a model trained with it by other measures than
    perplexity.
    """

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        p = project(logits.detach())
        omega = (1 - p.square().sum(-1)) / 2
        return omega + (p * logits).sum(-1) - pick(logits, labels)  # dΩ cancels against dp


def project(z: Tensor) -> Tensor:
    """The nearest point of the simplex, `(…, V)`: `[z − τ]₊` with the threshold found by sorting."""
    ordered = z.sort(-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    excess = ordered.cumsum(-1) - 1
    support = (rank * ordered > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (z - threshold).clamp_min(0)
