"""Linear attention that forgets: every head's state fades at its own rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.forms import repeated
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class DecayLinear(LinearSpec, name="decay_linear"):
    """`S_t = λ_h S_{t−1} + φ(k) vᵀ`, out `g · rms_norm(φ(q) S)`, `φ = silu`

    Source: arXiv:2307.14995 (TransNormerLLM): λ of head h of H in layer ℓ of L starts at `exp(−8h/H · (1 − ℓ/L))`, h
    from 1; no denominator. g is a gain per channel.

    Args:
        learn: train λ, as `exp(−exp(rate))`; False keeps it.
        eps: ε of the norm.
    """

    learn: bool = True
    eps: Positive = 1e-6
    sums_to_one: ClassVar[bool] = False
    sinks: ClassVar[bool] = False

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`rate (H,)`, `gain (H, D)`."""
        head = torch.arange(1, geometry.heads + 1) / geometry.heads
        rate = 8 * head * (1 - geometry.layer_idx / geometry.layers)
        return {"rate": rate.log(), "gain": torch.ones(geometry.heads, geometry.head_dim)}

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        if not inputs.causal:
            raise ValueError(
                "decay_linear reads a text from its beginning to its end; an encoder's attention reads both ways. "
                "elu_linear or hedgehog do"
            )
        rate = params["rate"] if self.learn else params["rate"].detach()
        log_decay = -rate.exp().view(1, -1, 1).expand(1, -1, past.keys)
        query, key = F.silu(inputs.query), repeated(F.silu(inputs.key), past.heads)
        return past.sum(query, key, inputs.value, log_decay)[0]

    def output(self, mixed: Tensor, inputs: Inputs, params: Params) -> Tensor:
        return rms_norm(mixed, self.eps) * params["gain"].unsqueeze(-2)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """`x / √(mean(x²) + ε)`; 0 stays 0."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
