"""A learned kernel: positive random features of a distribution that is trained."""

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
class LearnedKernel(LinearSpec, name="learned_kernel"):
    """`w ∝ φ(q)·φ(k)`, `φ(x) = exp(x̂·ω' − ‖x̂‖²)`, `ω' = ω ⊙ exp(σ / 2) + μ`, `x̂ = √scaling · x`, divided by `Σ w + ε`

    Source: arXiv:2110.08323 (GMM-PRF; the square without its half makes it a Gaussian kernel). There ω is drawn anew in
    every training step; here once, so that a state stays what it is.

    Args:
        features: columns of ω.
        eps: ε.
    """

    features: Count = 64
    eps: Positive = 1e-6

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`omega (D, features)`, `mean` and `sigma (H, D)`."""
        shape = (geometry.heads, geometry.head_dim)
        bound = (6 / sum(shape)) ** 0.5
        return {
            "omega": torch.randn(geometry.head_dim, self.features),
            "mean": torch.empty(shape).uniform_(-bound, bound),
            "sigma": torch.zeros(shape),
        }

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        omega = params["omega"] * (params["sigma"] / 2).exp().unsqueeze(-1)
        omega = omega + params["mean"].unsqueeze(-1)
        root = inputs.scaling**0.5
        key = repeated(inputs.key, past.heads)
        query, key = (_positive(x * root, omega) for x in (inputs.query, key))
        return past.mean(query, key, inputs.value, self.eps)


def _positive(x: Tensor, omega: Tensor) -> Tensor:
    exponent = x @ omega - x.square().sum(-1, keepdim=True)
    features: Tensor = exponent.exp() * omega.shape[-1] ** -0.5
    return features
