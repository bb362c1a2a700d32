"""Gated delta rule: a state that replaces what it holds under a key, and forgets as the text tells it to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.decay_linear import rms_norm
from hf_softheads.attention.linear.forms import repeated
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class GatedDelta(LinearSpec, name="gated_delta"):
    """`S_t = α_t (I − β_t k kᵀ) S_{t−1} + β_t k vᵀ`, out `σ(x W_g + b_g) · g · rms_norm(q S / √D)`, q and k of length 1

    Source: arXiv:2412.06464 (Gated DeltaNet, the linear layer of Qwen3-Next), without its short convolution and with a
    gate that can start open; x is the layer's input, `α = exp(−exp(A) · softplus(x W_a + b_a))`, `β = σ(x W_b + b_b)`.

    It starts as a conversion needs it: α forgets within `shortest` tokens in the first head to `longest` in the last,
    β = 0.12, the gate open.

    Args:
        shortest: tokens after which the first head has forgotten all but 1/e.
        longest: the same of the last head.
        eps: ε of the norm.
    """

    shortest: Count = 64
    longest: Count = 4096
    eps: Positive = 1e-6
    sums_to_one: ClassVar[bool] = False
    sinks: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.longest < self.shortest:
            raise ValueError(
                f"gated_delta: longest must be at least shortest, got {self.longest} and {self.shortest}"
            )

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`W_a, W_b (H, hidden)`, `A, b_a, b_b (H,)`, `W_g (H·D, hidden)`, `b_g (H·D,)`, `gain (H, D)`."""
        heads, hidden = geometry.heads, geometry.hidden_size
        channels = heads * geometry.head_dim
        share = torch.linspace(0, 1, heads) if heads > 1 else torch.ones(1)
        memory = self.shortest * (self.longest / self.shortest) ** share
        return {
            "W_a": torch.zeros(heads, hidden),
            "W_b": torch.zeros(heads, hidden),
            "W_g": torch.zeros(channels, hidden),
            "A": torch.zeros(heads),
            "b_a": (1 / memory).expm1().log(),
            "b_b": torch.full((heads,), -2.0),
            "b_g": torch.full((channels,), 6.0),
            "gain": torch.ones(heads, geometry.head_dim),
        }

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        x = inputs.hidden
        if not inputs.causal:
            raise ValueError(
                "gated_delta reads a text from its beginning to its end; an encoder's attention reads both ways. "
                "elu_linear or hedgehog do"
            )
        if x is None or x.shape[1] != past.keys:
            raise ValueError(
                f"gated_delta reads the layer's input of every key, got {0 if x is None else x.shape[1]} for "
                f"{past.keys} keys; give earlier keys as a state (state=attention.State()), as a patched layer does"
            )
        x = x.to(params["W_a"].dtype)
        opened = F.softplus(x @ params["W_a"].mT + params["b_a"]).mT
        log_decay = -params["A"].exp().unsqueeze(-1) * opened
        beta = (x @ params["W_b"].mT + params["b_b"]).sigmoid().mT
        query = F.normalize(inputs.query, dim=-1) * inputs.query.shape[-1] ** -0.5
        key = repeated(F.normalize(inputs.key, dim=-1), past.heads)
        return past.delta(query, key, repeated(inputs.value, past.heads), beta, log_decay)

    def output(self, mixed: Tensor, inputs: Inputs, params: Params) -> Tensor:
        assert inputs.hidden is not None
        x = inputs.hidden.to(params["W_g"].dtype)
        gates = (x @ params["W_g"].mT + params["b_g"]).sigmoid()
        gates = gates.unflatten(-1, (mixed.shape[1], -1)).transpose(1, 2)
        gated: Tensor = rms_norm(mixed, self.eps) * params["gain"].unsqueeze(-2) * gates
        return gated
