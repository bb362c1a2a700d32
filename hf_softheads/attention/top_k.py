"""Sparse softmax: softmax over the k largest scores of a row, and what becomes of the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, lowered, softmax
from hf_softheads.attention.call import Params, RowMap
from hf_softheads.registry import Count


@dataclass(frozen=True)
class TopK(AttentionSpec, name="top_k"):
    """softmax over the k largest visible scores of the row, 0 elsewhere

    Source: arXiv:2112.12433; gradients through the survivors only, ties as `torch.topk` breaks them.

    Published: the others are dropped. This project's addition, for heads that attend evenly over more than k keys:
    the k survivors keep their probability among *all* visible keys, and the others share what is left by a polynomial
    of their score, which a decoder could keep as a state of fixed size instead of the keys themselves. With m and σ²
    mean and variance of their scores and d = z - m, a weight is proportional to 1 (`"mean"`), `1 + d` (`"linear"`,
    may be negative) or `1 + d + d²/2` (`"quadratic"`, positive): exp(d), expanded. Nothing is 0 then, and as all
    scores are computed, nothing is saved either.

    Args:
        k: keys that survive; a row that sees no more than k is the softmax.
        rest: what becomes of the others: `"drop"`, `"mean"`, `"linear"`, `"quadratic"`. None: as a function, `"drop"`;
            in a pretrained model `"quadratic"`, since dropping harms heads that attend evenly.
    """

    k: Count = 64
    rest: Literal["drop", "mean", "linear", "quadratic", None] = None

    @property
    def exact_zeros(self) -> bool:  # type: ignore[override]
        return self.rest in (None, "drop")

    @property
    def training_free(self) -> bool:  # type: ignore[override]
        return self.rest in ("linear", "quadratic")

    def for_pretrained(self) -> TopK:
        return replace(self, rest="quadratic") if self.rest is None else self

    def row_map(self) -> RowMap | None:
        return RowMap("top_k", (float(self.k),)) if self.exact_zeros else None

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        if self.k >= scores.shape[-1]:
            return softmax(scores, keep)
        values, indices = lowered(scores, keep).topk(self.k, -1)
        if self.exact_zeros:
            kept = keep.expand_as(scores).gather(-1, indices)
            return torch.zeros_like(scores).scatter(-1, indices, values.softmax(-1) * kept)
        probabilities = softmax(scores, keep)
        others = keep.to(scores.dtype).expand_as(scores).scatter(-1, indices, 0.0)
        left = (probabilities * others).sum(-1, keepdim=True)
        shares = self._shares(scores, others)
        return torch.lerp(probabilities, left * shares, others)

    def _shares(self, scores: Tensor, others: Tensor) -> Tensor:
        """How the others divide what is left: sums to 1 over them, 0 elsewhere."""
        shares = others / others.sum(-1, keepdim=True).clamp(min=1)
        if self.rest == "mean":
            return shares
        d = (scores - (scores * shares).sum(-1, keepdim=True)) * others
        if self.rest == "linear":
            return shares * (1 + d)
        half = d * d / 2
        return shares * (1 + d + half) / (1 + (shares * half).sum(-1, keepdim=True))
