"""Based: the first three terms of the exponential, of projected queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.forms import Kernel, repeated
from hf_softheads.attention.linear.past import Past
from hf_softheads.attention.linear.taylor_softmax import taylor_features
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class Based(LinearSpec, name="based"):
    """`w ∝ 1 + z + z² / 2`, `z = scaling · (P_q q)·(P_k k)`, divided by `Σ w + ε`

    Source: arXiv:2402.18668, where small q and k are trained from the start; P is this project's, for heads of a
    trained model. Its short sliding window is a layer of its own there.

    Args:
        dim: rows of P, for `1 + dim + dim (dim + 1) / 2` features; None: no P.
        eps: ε.
    """

    dim: Count | None = 16
    eps: Positive = 1e-6

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`P_q` and `P_k (H, D, dim)`, or without `dim` none."""
        return projections(geometry, self.dim)

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        root = inputs.scaling**0.5
        query, key = (x * root for x in projected(inputs, params))
        kernel = Kernel(query, key, lambda z: 1 + z + z.square() / 2)
        maps = taylor_features(query), taylor_features(key)
        return past.mean(*maps, inputs.value, self.eps, kernel)


def projections(geometry: Geometry, dim: int | None) -> dict[str, Tensor]:
    """The same start for both: directions at random, so that `(P q)·(P k)` is `q·k` on average."""
    if dim is None:
        return {}
    shape = (geometry.heads, geometry.head_dim, dim)
    start = torch.randn(shape) * dim**-0.5
    return {"P_q": start, "P_k": start.clone()}


def projected(inputs: Inputs, params: Params) -> tuple[Tensor, Tensor]:
    """Queries and keys `(B, H, T, dim)`, or as they are."""
    if "P_q" not in params:
        return inputs.query, inputs.key
    key = repeated(inputs.key, inputs.query.shape[1])
    return inputs.query @ params["P_q"], key @ params["P_k"]
