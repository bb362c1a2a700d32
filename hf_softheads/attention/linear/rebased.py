"""ReBased: a learned parabola of the score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.based import projected, projections
from hf_softheads.attention.linear.forms import Kernel
from hf_softheads.attention.linear.past import Past
from hf_softheads.attention.linear.taylor_softmax import pairs
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class ReBased(LinearSpec, name="rebased"):
    """`w ∝ (scaling · f(P_q q)·f(P_k k))²`, `f(x) = γ ⊙ layer_norm(x) + β`, divided by `Σ w + ε`

    Source: arXiv:2402.10644, as in flash-linear-attention; P as in `based`.

    Args:
        dim: rows of P, for `dim (dim + 1) / 2` features; None: no P.
        eps: ε.
    """

    dim: Count | None = 16
    eps: Positive = 1e-6

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`gamma` and `beta (dim or D,)`, and with `dim` `P_q` and `P_k (H, D, dim)`."""
        width = self.dim or geometry.head_dim
        norm = {"gamma": torch.ones(width), "beta": torch.zeros(width)}
        return {**norm, **projections(geometry, self.dim)}

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        gamma, beta = params["gamma"], params["beta"]
        root = inputs.scaling**0.5
        query, key = (
            F.layer_norm(x, gamma.shape, gamma, beta, 1e-5) * root
            for x in projected(inputs, params)
        )
        kernel = Kernel(query, key, torch.square)
        return past.mean(pairs(query), pairs(key), inputs.value, self.eps, kernel)
