"""Sparse softmax: softmax over the k largest scores of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, Params, lowered, softmax


@dataclass(frozen=True)
class TopK(AttentionSpec, name="top_k"):
    """softmax over the k largest visible scores of the row, 0 elsewhere

    Source: arXiv:2112.12433; gradients through the survivors only, ties as `torch.topk` breaks them.

    Args:
        k: keys that survive; a row that sees no more than k is the softmax. A head that attends evenly over its whole
            context needs a k of about that length.
    """

    k: int = 64
    exact_zeros: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        if self.k >= scores.shape[-1]:
            return softmax(scores, keep)
        values, indices = lowered(scores, keep).topk(self.k, -1)
        kept = keep.expand_as(scores).gather(-1, indices)
        return torch.zeros_like(scores).scatter(-1, indices, values.softmax(-1) * kept)
