"""Hedgehog: learned softmax features that imitate the softmax's own weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.forms import repeated
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class Hedgehog(LinearSpec, name="hedgehog"):
    """`w ∝ φ_q(q)·φ_k(k)`, `φ(x) = [softmax(x W), softmax(−x W)]`, divided by `Σ w + ε`

    Source: arXiv:2402.04347, in the form of arXiv:2410.10254 (LoLCATs): softmax over the features of each half, clamped
    at ε; W of every query head, one for queries and one for keys. To be trained on the layer's own softmax first.

    Args:
        features: columns of W; φ has twice as many.
        eps: ε.
    """

    features: Count = 64
    eps: Positive = 1e-12

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`W_q` and `W_k (H, D, features)`."""
        shape = (geometry.heads, geometry.head_dim, self.features)
        bound = (6 / (geometry.head_dim * self.features)) ** 0.5
        return {name: torch.empty(shape).uniform_(-bound, bound) for name in ("W_q", "W_k")}

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        query, key = self.maps(inputs, params)
        return past.mean(query, key, inputs.value, self.eps)

    def maps(self, inputs: Inputs, params: Params) -> tuple[Tensor, Tensor]:
        """`φ_q(q)` and `φ_k(k)`, `(B, H, T, 2 · features)`."""
        key = repeated(inputs.key, inputs.query.shape[1])
        return (
            both_softmaxes(inputs.query @ params["W_q"], self.eps),
            both_softmaxes(key @ params["W_k"], self.eps),
        )


def both_softmaxes(x: Tensor, eps: float) -> Tensor:
    """`[softmax(x), softmax(−x)]`, at least ε."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp(min=eps)
