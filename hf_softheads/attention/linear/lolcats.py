"""LoLCATs: the softmax over the latest tokens, learned features for all earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.call import Geometry, Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.blocks import windowed
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
        return windowed(past, inputs.query, inputs.key, inputs.value, _Window(self, inputs, params))

    def _quadratic(self, inputs: Inputs, params: Params, keep: Tensor) -> Tensor:
        rank, n = keep.cumsum(-1) - 1, keep.sum(-1, keepdim=True)  # among the keys of each query
        near = n - 1 - rank < self.window
        if self.shape == "terraced":
            near = rank // self.window >= (n - 1) // self.window - 1
        key = repeated(inputs.key, inputs.query.shape[1])
        query_map = both_softmaxes(inputs.query @ params["W_q"], self.eps)
        features = query_map @ both_softmaxes(key @ params["W_k"], self.eps).mT
        weights = self.weights_of(inputs, params, inputs.query @ key.mT, features, keep, near)
        sums: Tensor = weights @ repeated(inputs.value, weights.shape[1])
        total = weights.sum(-1, keepdim=True)
        return sums / total.masked_fill(total == 0, 1.0)

    def weights_of(
        self,
        inputs: Inputs,
        params: Params,
        products: Tensor,
        features: Tensor,
        keep: Tensor,
        near: Tensor,
    ) -> Tensor:
        """Weights before they are divided by their sum, from all `q·k` and `φ(q)·φ(k)`."""
        scores = products * inputs.scaling
        if inputs.softcap is not None:
            scores = (scores / inputs.softcap).tanh() * inputs.softcap
        largest = scores.masked_fill(~(keep & near), -torch.inf).amax(-1, keepdim=True)
        scores = scores - largest.masked_fill(largest == -torch.inf, 0.0)
        window = scores.masked_fill(~(keep & near), -torch.inf).exp()
        share = params["window_factor"].sigmoid().view(1, -1, *[1] * (window.ndim - 2))
        return share * window + features.masked_fill(~keep | near, 0.0)


@dataclass(frozen=True)
class _Window:
    """One call's window, see `Windowed`."""

    spec: LoLCATs
    inputs: Inputs
    params: Params

    @property
    def kept(self) -> int:
        return self.spec.window * (1 if self.spec.shape == "sliding" else 2)

    def leaving(self, count: Tensor) -> Tensor:
        size = self.spec.window
        if self.spec.shape == "sliding":
            return (count - size + 1).clamp(min=0)
        return (count // size - 1).clamp(min=0) * size

    def features(self, key: Tensor) -> Tensor:
        key = repeated(key, self.inputs.query.shape[1])
        return both_softmaxes(key @ self.params["W_k"], self.spec.eps)

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, here: Tensor, state: Tensor
    ) -> Tensor:
        scores, near = query @ key.mT, torch.ones_like(here)
        weights = self.spec.weights_of(
            self.inputs, self.params, scores, torch.zeros_like(scores), here, near
        )
        return weights @ value + self._reading(query) @ state

    def blocks(self, query: Tensor, key: Tensor, value: Tensor, state: Tensor) -> Tensor:
        tokens, size = query.shape[2], self.spec.window
        entering, reading = self.features(key), self._reading(query)
        query, key, value, entering, reading = (
            in_chunks(x, size) for x in (query, key, value, entering, reading)
        )
        states = scan(entering.mT @ value, None, state)
        # each block sees itself, the one before, and a state of those before that
        before = torch.cat([states[:, :, :1], states[:, :, :-2]], 2)
        key, value, entering = (torch.cat([_previous(x), x], 3) for x in (key, value, entering))
        rows = torch.arange(size, device=query.device).view(-1, 1) + size
        columns = torch.arange(2 * size, device=query.device)
        keep = (columns <= rows).expand(query.shape[2], -1, -1).clone()
        keep[0, :, :size] = False  # before the first block there is only the state
        near = rows - columns < (size if self.spec.shape == "sliding" else 2 * size)
        weights = self.spec.weights_of(
            self.inputs, self.params, query @ key.mT, reading @ entering.mT, keep, near
        )
        sums = weights @ value + reading @ before
        return sums.flatten(2, 3)[:, :, :tokens]

    def _reading(self, query: Tensor) -> Tensor:
        return both_softmaxes(query @ self.params["W_q"], self.spec.eps)


def _previous(x: Tensor) -> Tensor:
    """Each block's predecessor, `(B, H, N, C, X)`; zeros before the first."""
    shifted: Tensor = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return shifted
