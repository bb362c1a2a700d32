"""LoLCATs: the softmax over the latest tokens, learned features for all earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.blocks import in_blocks
from hf_softheads.attention.linear.forms import in_chunks, repeated, scan
from hf_softheads.attention.linear.hedgehog import both_softmaxes
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Count, Positive


@dataclass(frozen=True)
class LoLCATs(LinearSpec, name="lolcats"):
    """`w ∝ γ_h exp(z − max z)` for keys in the window, `w ∝ φ_q(q)·φ_k(k)` for earlier ones, φ as in `hedgehog`

    Source: arXiv:2410.10254. γ is a learned share of every head, `σ(window_factor)`. A `"sliding"` window is the latest
    `window` keys; a `"terraced"` one the query's block of `window` tokens and the block before, here in decoding too.

    Args:
        window: tokens of the window or of a block.
        features: columns of W; φ has twice as many.
        shape: of the window.
        eps: smallest feature.
    """

    window: Count = 64
    features: Count = 64
    shape: Literal["sliding", "terraced"] = "sliding"
    eps: Positive = 1e-12

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`W_q` and `W_k (H, D, features)`, `window_factor (H,)`."""
        shape = (geometry.heads, geometry.head_dim, self.features)
        bound = (6 / (geometry.head_dim * self.features)) ** 0.5
        maps = {name: torch.empty(shape).uniform_(-bound, bound) for name in ("W_q", "W_k")}
        return {**maps, "window_factor": torch.full((geometry.heads,), -2.1972245773362196)}

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        if not inputs.causal:
            raise ValueError(
                "lolcats has a window of earlier tokens, and an encoder's attention reads both ways. hedgehog does"
            )
        if past.form == "quadratic":
            return self._quadratic(inputs, params, past.keep())
        sums, total = in_blocks(
            past,
            inputs.query,
            inputs.key,
            inputs.value,
            self.window,
            lambda *tensors: self._blocks(inputs, params, *tensors),
            lambda key: self._map(repeated(key, past.heads), params["W_k"]),
        )
        return sums / _or_one(total)

    def _map(self, x: Tensor, matrix: Tensor) -> Tensor:
        return both_softmaxes(x @ matrix, self.eps)

    def _quadratic(self, inputs: Inputs, params: Params, keep: Tensor) -> Tensor:
        rank, n = keep.cumsum(-1) - 1, keep.sum(-1, keepdim=True)  # among the keys of each query
        near = n - 1 - rank < self.window
        if self.shape == "terraced":
            near = rank // self.window >= (n - 1) // self.window - 1
        key = repeated(inputs.key, inputs.query.shape[1])
        features = self._map(inputs.query, params["W_q"]) @ self._map(key, params["W_k"]).mT
        weights = self._weights(inputs, params, inputs.query @ key.mT, features, keep, near)
        sums: Tensor = weights @ repeated(inputs.value, weights.shape[1])
        return sums / _or_one(weights.sum(-1, keepdim=True))

    def _weights(
        self,
        inputs: Inputs,
        params: Params,
        products: Tensor,
        features: Tensor,
        keep: Tensor,
        near: Tensor,
    ) -> Tensor:
        scores = products * inputs.scaling
        if inputs.softcap is not None:
            scores = (scores / inputs.softcap).tanh() * inputs.softcap
        largest = scores.masked_fill(~(keep & near), -torch.inf).amax(-1, keepdim=True)
        scores = scores - largest.masked_fill(largest == -torch.inf, 0.0)
        window = scores.masked_fill(~(keep & near), -torch.inf).exp()
        share = params["window_factor"].sigmoid().view(1, -1, *[1] * (window.ndim - 2))
        return share * window + features.masked_fill(~keep | near, 0.0)

    def _blocks(
        self,
        inputs: Inputs,
        params: Params,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: Tensor,
    ) -> Tensor:
        """Tokens from the beginning of a block on, `(B, H, T, …)`; the state is of all blocks before."""
        tokens, size = query.shape[2], self.window
        entering = in_chunks(self._map(key, params["W_k"]), size)
        reading = in_chunks(self._map(query, params["W_q"]), size)
        query, key, value = (in_chunks(x, size) for x in (query, key, value))
        states = scan(entering.mT @ value, None, state)
        # each block sees itself, the one before, and a state of those before that
        before = torch.cat([states[:, :, :1], states[:, :, :-2]], 2)
        key, value, entering = (torch.cat([_previous(x), x], 3) for x in (key, value, entering))
        rows = torch.arange(size, device=query.device).view(-1, 1) + size
        columns = torch.arange(2 * size, device=query.device)
        keep = columns <= rows
        first = torch.ones_like(keep).expand(query.shape[2], -1, -1).clone()
        first[0, :, :size] = False  # before the first block there is only the state
        keep = keep & first
        near = rows - columns < size if self.shape == "sliding" else torch.ones_like(keep[0])
        weights = self._weights(inputs, params, query @ key.mT, reading @ entering.mT, keep, near)
        sums = weights @ value + reading @ before
        return sums.flatten(2, 3)[:, :, :tokens]


def _previous(x: Tensor) -> Tensor:
    """Each block's predecessor, `(B, H, N, C, X)`; zeros before the first."""
    shifted: Tensor = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return shifted


def _or_one(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1.0)
