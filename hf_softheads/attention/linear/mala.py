"""Magnitude-aware linear attention: the size of a query sharpens its weights again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hf_softheads.attention.call import Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.elu_linear import raised
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class MALA(LinearSpec, name="mala"):
    """`w = β a − S / n`, `a = scaling · φ(q)·φ(k)`, `S = Σ a`, `β = 1 + 1 / (S + ε)`, `φ = elu + 1`

    Source: arXiv:2507.00698; causal with n the number of keys that the query sees. Weights may be negative.

    Args:
        a: as in the `"paper"`, or divided by n as in the authors' `"code"`.
        eps: ε.
    """

    a: Literal["paper", "code"] = "paper"
    eps: Positive = 1e-6

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        query, key = raised(inputs.query) * inputs.scaling, raised(inputs.key)
        sums, total = past.sum(query, key, inputs.value)
        ones = query.new_ones(1)
        values, n = past.sum(
            ones.expand(*query.shape[:3], 1), ones.expand(*key.shape[:3], 1), inputs.value
        )
        n = n.clamp(min=1)
        if self.a == "code":
            sums, total = sums / n, total / n
        return (1 + 1 / (total + self.eps)) * sums - total / n * values
