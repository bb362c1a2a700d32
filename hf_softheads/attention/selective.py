"""Selective self-attention: temperatures from the position and from the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.registry import Count


@dataclass(frozen=True)
class Selective(AttentionSpec, name="selective"):
    """`softmax(τ · z) @ (τ_v · v)`, `τ = τ_position(n) + τ_token(x)`

    Source: arXiv:2411.12892. As released, `τ = 1 + exp(-exp(β)) · log n` with one β per layer (`position="exp"`); the
    second release has `1 + β · log n` (`"linear"`), the paper `1 + σ(β) · log n` (`"sigmoid"`). The token parts are
    the paper's: `τ_token(x) = tanh(f(x))` and `τ_v(x) = 1 + tanh(f_v(x))`, f a two-layer perceptron whose last layer
    starts at 0, so that every form starts near the identity.

    Args:
        position: the form of the position temperature.
        token: add the token temperature to the queries.
        values: temper the values too. A patched layer tempers them as they enter its KV cache; `attend` alone takes the
            values of the queries' own tokens.
        width: hidden units of f.
    """

    position: Literal["exp", "linear", "sigmoid"] = "exp"
    token: bool = False
    values: bool = False
    width: Count = 16
    training_free: ClassVar[bool] = True

    _START: ClassVar[dict[str, float]] = {"exp": 2.0, "linear": 1e-5, "sigmoid": -8.0}

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        return self.token or self.values

    @property
    def tempers_values(self) -> bool:  # type: ignore[override]
        return self.values

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`beta ()`, and per perceptron `in (width, hidden)` and `out (width,)`."""
        params = {"beta": torch.tensor(self._START[self.position])}
        for name in self._perceptrons():
            inner = torch.randn(self.width, geometry.hidden_size)
            params[f"{name}_in"] = inner * max(geometry.hidden_size, 1) ** -0.5
            params[f"{name}_out"] = torch.zeros(self.width)
        return params

    def scale_queries(
        self, query: Tensor, n_keys: Tensor, params: Params, hidden: Tensor | None
    ) -> Tensor:
        beta = params["beta"].to(query.dtype)
        rate = {"exp": lambda: (-beta.exp()).exp(), "linear": lambda: beta, "sigmoid": beta.sigmoid}
        temperature = 1 + rate[self.position]() * n_keys.to(query.dtype).log()
        if self.token and hidden is not None:
            temperature = temperature + _token_part("token", hidden, params)
        return query * temperature

    def temper_values(self, value: Tensor, hidden: Tensor, params: Params) -> Tensor:
        return (value * (1 + _token_part("values", hidden, params))).to(value.dtype)

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        if self.values and not inputs.tempered and inputs.hidden is not None:
            if inputs.key.shape[2] != inputs.query.shape[2]:
                raise ValueError(
                    "selective(values=True) tempers the values of the tokens that this call reads, got "
                    f"{inputs.query.shape[2]} of them and {inputs.key.shape[2]} cached values; temper values before "
                    "they enter a cache, as a patched layer does, or run with use_cache=False"
                )
            value = self.temper_values(inputs.value, inputs.hidden, params)
            inputs = inputs.replace(value=value, tempered=True)
        return super().forward(inputs, params)

    def _perceptrons(self) -> list[str]:
        return [name for name, asked in (("token", self.token), ("values", self.values)) if asked]


def _token_part(name: str, hidden: Tensor, params: Params) -> Tensor:
    """`tanh(f(x))`, `(B, 1, Q, 1)`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    inner, outer = params[f"{name}_in"].to(dtype), params[f"{name}_out"].to(dtype)
    return ((hidden.to(dtype) @ inner.mT).tanh() @ outer).tanh()[:, None, :, None]
