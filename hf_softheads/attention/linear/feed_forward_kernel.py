"""A kernel that is a small network: any positive features, learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.forms import repeated
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class FeedForwardKernel(LinearSpec, name="feed_forward_kernel"):
    """`w ∝ φ_q(q)·φ_k(k)`, `φ(x) = softplus(gelu(x W₁) W₂)`, divided by `Σ w + ε`

    Source: after arXiv:2211.04076, which gives no sizes; a network of every query head, one for queries and one for
    keys, to be trained on the layer's own softmax first.

    Args:
        features: columns of W₂.
        width: columns of W₁; None: twice the head dimension.
        eps: ε.
    """

    features: Count = 64
    width: Count | None = None
    eps: Positive = 1e-6

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`W1_q` and `W1_k (H, D, width)`, `W2_q` and `W2_k (H, width, features)`."""
        heads, dim, width = geometry.heads, geometry.head_dim, self.width or 2 * geometry.head_dim
        return {
            f"{name}_{side}": torch.randn(heads, *shape) * shape[0] ** -0.5
            for side in "qk"
            for name, shape in (("W1", (dim, width)), ("W2", (width, self.features)))
        }

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        query, key = (
            F.softplus(F.gelu(x @ params[f"W1_{side}"]) @ params[f"W2_{side}"])
            for x, side in ((inputs.query, "q"), (repeated(inputs.key, past.heads), "k"))
        )
        return past.mean(query, key, inputs.value, self.eps)
