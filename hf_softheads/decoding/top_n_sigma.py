"""Top-nσ: tokens whose logits stand out from the noise of all."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class TopNSigma(LogitsProcessor):
    """Keeps `z_v > max z - n · σ(z)`, σ the sample standard deviation of the row's finite logits (arXiv 2411.07641).

    The tokens kept are the same at every temperature. Logits of -inf stay so and count nothing; a row in which no token
    stands out keeps its best. σ is that of all tokens, so put it before processors that cut.

    Raises:
        ValueError: n is not above 0.
    """

    on_candidates = "by value"

    def __init__(self, n: float = 1.0):
        if not 0 < n < float("inf"):
            raise ValueError(
                f"top-nσ keeps what lies within n standard deviations of the best; n must be above 0, got {n}"
            )
        self.n = n

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        z = scores.float()
        finite = z.isfinite()
        count = finite.sum(-1, keepdim=True)
        known = z.masked_fill(~finite, 0)
        mean = known.sum(-1, keepdim=True) / count.clamp_min(1)
        square = (known - mean).square().masked_fill(~finite, 0).sum(-1, keepdim=True)
        sigma = (square / (count - 1).clamp_min(1)).sqrt()
        keep = z > z.amax(-1, keepdim=True) - self.n * sigma
        return kept_or_best(scores, keep)


def kept_or_best(scores: Tensor, keep: Tensor) -> Tensor:
    """`scores (B, V)` with -inf where they are not kept; the best of a row that keeps none."""
    none = ~(keep & (scores > -torch.inf)).any(-1, keepdim=True)
    best = torch.zeros_like(keep).scatter(-1, scores.argmax(-1, keepdim=True), True)
    return scores.masked_fill(~torch.where(none, best, keep), -torch.inf)
