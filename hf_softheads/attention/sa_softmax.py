"""Self-adjusting softmax: probabilities times scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, softmax
from hf_softheads.attention.call import Params, RowMap
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class SASoftmax(AttentionSpec, name="sa_softmax"):
    """`w = p · (z - min(z_min, 0)) / (max(z_max, 0) - min(z_min, 0))`, `p = softmax(z)`

    Source: arXiv:2502.18277, the default form; `normalised=False` is `w = p · z`.

    Args:
        normalised: adjust by the row's range, so that weights lie in [0, 1].
        eps: added to the range (the authors' code adds 1e-10 twice).
    """

    normalised: bool = True
    eps: Positive = 2e-10
    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True  # the row's smallest score, if it is negative

    def row_map(self) -> RowMap:
        return RowMap("sa_softmax", (float(self.normalised), self.eps))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        probabilities = softmax(scores, keep)
        inside = scores * keep  # a zero changes neither min(z_min, 0) nor max(z_max, 0)
        if not self.normalised:
            return probabilities * inside
        zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
        low = torch.minimum(inside.amin(-1, keepdim=True), zero)
        high = torch.maximum(inside.amax(-1, keepdim=True), zero)
        return probabilities * (inside - low) / (high - low + self.eps)
