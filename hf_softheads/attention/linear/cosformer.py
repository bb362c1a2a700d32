"""cosFormer: relu features whose weights fade like a cosine of the distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.attention.call import Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class CosFormer(LinearSpec, name="cosformer"):
    """`w ∝ relu(q)·relu(k) · cos(π (i − j) / 2m)`, divided by `max(Σ w, ε)`

    Source: arXiv:2202.08791. There m is the length of the text at hand, so that every further token changes the output
    of all earlier ones; here it is a number, and a step over a cache equals the full forward.

    Args:
        length: m, the most tokens that a text may have, padding included.
        eps: ε.
    """

    length: Count = 4096
    eps: Positive = 1e-6

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        rows, columns = past.positions()
        if past.length > self.length:
            raise ValueError(
                f"cosformer(length={self.length}) got a text of {past.length} tokens; the cosine falls below 0 from "
                "there on, so give it the longest text that it will read"
            )
        sums, total = past.sum(
            self._turned(inputs.query, rows), self._turned(inputs.key, columns), inputs.value
        )
        return sums / total.clamp(min=self.eps)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = (positions + 1) * (math.pi / 2 / self.length)
        x, angle = x.relu(), angle.to(x)
        return torch.cat([x * angle.sin(), x * angle.cos()], -1)
