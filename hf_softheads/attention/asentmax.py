"""Adaptive-scalable entmax: entmax-1.5 whose scores grow with a learned power of log n."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.base import per_head
from hf_softheads.attention.call import Geometry, Params
from hf_softheads.attention.entmax15 import Entmax15


@dataclass(frozen=True)
class ASEntmax(Entmax15, name="asentmax"):
    """`entmax15((δ + β · log(n + 1)^γ) · z)`

    Source: arXiv:2506.16640; β and γ per token and head from the layer's input, `β = softplus(x W_β)`,
    `γ = 2 tanh(x W_γ)`, or one learned pair per head.

    Args:
        adaptive: take β and γ from the layer's input.
        delta: δ.
    """

    adaptive: bool = True
    delta: float = 1.0

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        return self.adaptive

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`W_beta, W_gamma (H, hidden)`, or without `adaptive` `beta, gamma (H,)`."""
        if not self.adaptive:
            return {
                "beta": 1 + 0.1 * torch.randn(geometry.heads),
                "gamma": torch.zeros(geometry.heads),
            }
        shape, std = (geometry.heads, geometry.hidden_size), max(geometry.hidden_size, 1) ** -0.5
        return {"W_beta": std * torch.randn(shape), "W_gamma": std * torch.randn(shape)}

    def scale_queries(
        self, query: Tensor, n_keys: Tensor, params: Params, hidden: Tensor | None
    ) -> Tensor:
        if self.adaptive and hidden is not None:
            beta, gamma = (
                F.linear(hidden.to(query.dtype), params[name].to(query.dtype))
                .mT.contiguous()
                .unsqueeze(-1)
                for name in ("W_beta", "W_gamma")
            )
            beta, gamma = F.softplus(beta), 2 * gamma.tanh()
        else:
            beta, gamma = per_head(params["beta"]), per_head(params["gamma"])
        return query * (self.delta + beta * (n_keys + 1).to(query.dtype).log() ** gamma)
