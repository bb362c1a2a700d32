"""The softmax's exponential by the first terms of its series, which are a recurrence each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.forms import Kernel
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Bounds

_LARGEST = 3  # terms whose features, about D²/2, are worth a state


@dataclass(frozen=True)
class TaylorSoftmax(LinearSpec, name="taylor_softmax"):
    """`w ∝ Σ_{j < terms} z^j / j!`

    Source: arXiv:2507.23632. Up to 3 terms are features of `1 + D + D (D + 1) / 2` numbers and a state; with more it is
    a map of scores like any other and keeps its keys. An odd number of terms is positive everywhere.

    Args:
        terms: how many; the sum nears the softmax for `|z|` up to about half of it.
    """

    terms: Annotated[int, Bounds(at_least=2, at_most=80)] = 3

    @property
    def has_state(self) -> bool:  # type: ignore[override]
        return self.terms <= _LARGEST

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        series = self._series(scores) * keep
        total = series.sum(-1, keepdim=True)
        return series / total.masked_fill(total == 0, 1)

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        return super().forward(inputs, params) if self.has_state else self.by_engine(inputs, params)

    def by_engine(self, inputs: Inputs, params: Params) -> Tensor:
        """As a map of scores."""
        return AttentionSpec.forward(self, inputs, params)

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        root = inputs.scaling**0.5
        query, key = inputs.query * root, inputs.key * root
        sums, total = past.sum(
            taylor_features(query, self.terms),
            taylor_features(key, self.terms),
            inputs.value,
            kernel=Kernel(query, key, self._series),
        )
        return sums / total.masked_fill(total == 0, 1)

    def _series(self, z: Tensor) -> Tensor:
        """Horner's scheme."""
        out = torch.ones_like(z)
        for j in range(self.terms - 1, 0, -1):
            out = 1 + out * z / j
        return out


def taylor_features(x: Tensor, terms: int = 3) -> Tensor:
    """`φ(x)·φ(y)` is the sum of the first two or three terms of the series of `exp(x·y)`."""
    ones = torch.ones_like(x[..., :1])
    if terms == 2:
        return torch.cat([ones, x], -1)
    return torch.cat([ones, x, pairs(x) / math.sqrt(2)], -1)


def pairs(x: Tensor) -> Tensor:
    """`φ(x)·φ(y) = (x·y)²` with `D (D + 1) / 2` features: squares, and `√2 x_i x_j` for `i < j`."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
    mixed = x.index_select(-1, i) * x.index_select(-1, j)
    return torch.cat([x.square(), math.sqrt(2) * mixed], -1)
