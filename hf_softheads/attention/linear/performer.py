"""Performer: random features whose products are, on average, the softmax's own weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.forms import repeated
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class Performer(LinearSpec, name="performer"):
    """`w = φ(q)·φ(k) / φ(q)·(Σ φ(k) + 10⁻⁶)`, `φ(x) = exp(ω x̂ − ‖x̂‖² / 2 − s) + ε`, `x̂ = √scaling · x`

    Source: arXiv:2009.14794 (FAVOR+). For a query s is the largest of its `ω x̂`. For keys it is there the largest of
    all tokens, later ones included; here it is a number of each head, so that a step over a
    cache equals the full forward.

    Args:
        features: rows of ω, orthogonal in blocks; None: `⌊D ln D⌋`.
        eps: ε.
    """

    features: Count | None = None
    eps: Positive = 1e-4
    train_through: ClassVar[bool] = False  # no gradient through s, as published

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`omega (features, D)`, `shift (H,)`."""
        dim = geometry.head_dim
        rows = self.features or max(1, int(dim * math.log(dim)))
        blocks = [torch.linalg.qr(torch.randn(dim, dim))[0].mT for _ in range(-(-rows // dim))]
        lengths = torch.randn(rows, dim).norm(dim=1, keepdim=True)
        return {
            "omega": torch.cat(blocks)[:rows] * lengths,
            "shift": torch.zeros(geometry.heads),
        }

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        root = inputs.scaling**0.5
        query, key = inputs.query * root, repeated(inputs.key, past.heads) * root
        largest = (query @ params["omega"].mT).detach().amax(-1, keepdim=True)
        query = self._map(query, params["omega"], largest)
        key = self._map(key, params["omega"], params["shift"].view(1, -1, 1, 1))
        sums, total = past.sum(query, key, inputs.value)
        return sums / (total + 1e-6 * query.sum(-1, keepdim=True))

    def _map(self, x: Tensor, omega: Tensor, shift: Tensor) -> Tensor:
        exponent = x @ omega.mT - x.square().sum(-1, keepdim=True) / 2 - shift
        features: Tensor = (exponent.exp() + self.eps) * len(omega) ** -0.5
        return features
