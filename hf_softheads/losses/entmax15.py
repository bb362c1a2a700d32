"""The Fenchel–Young loss of 1.5-entmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick


@dataclass(frozen=True)
class Entmax15(LossSpec, name="entmax15"):
    """`Ω(p) + ⟨p − e_y, z⟩`, `p = [z/2 − τ]²₊` on the simplex, `Ω(p) = (1 − Σ p^1.5) / 0.75`; gradient `p − e_y`.

    Peters, Niculae & Martins, 1905.05702. Exactly 0 once the label leads by a margin of 2. `-log p` is not
    defined for a label outside the support: judge a model trained with it by other measures than perplexity.
    """

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        p = project(logits.detach())
        omega = (1 - (p * p.sqrt()).sum(-1)) / 0.75
        return omega + (p * logits).sum(-1) - pick(logits, labels)  # dΩ cancels against dp


def project(z: Tensor) -> Tensor:
    """1.5-entmax probabilities, `(…, V)`: `[z/2 − τ]²₊` with the threshold found by sorting."""
    z = (z - z.amax(-1, keepdim=True)) / 2
    ordered = z.sort(-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = ordered.cumsum(-1) / rank
    mean_square = ordered.square().cumsum(-1) / rank
    delta = (1 / rank - (mean_square - mean.square())).clamp_min(0)
    threshold = mean - delta.sqrt()
    support = (threshold <= ordered).sum(-1, keepdim=True)
    return (z - threshold.gather(-1, support - 1)).clamp_min(0).square()
