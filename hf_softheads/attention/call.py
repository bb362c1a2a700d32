"""One attention call, as variants and engines see it: its tensors, its row map, and who watches its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class RowMap(NamedTuple):
    """The name of a row map and its constants: how an engine with a table of row maps recognises one."""

    name: str
    constants: tuple[float, ...] = ()


SOFTMAX = RowMap("softmax")


@dataclass(frozen=True)
class ScoreForm:
    """A row map `w = f(z) · c`, c one number a row: `softmax(log f(z))` times `c · exp(lse)`, lse the log-sum-exp of
    `log f(z)`.

    Attributes:
        log_weight: `log f` of a score, given it and its sample, head, query and key; None: the score itself.
        factor: `c · exp(lse)`, `(B, H, Q)`, from the log-sum-exp `(B, H, Q)`; None: 1.
    """

    log_weight: ScoreMod | None = None
    factor: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Geometry:
    """The shape of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    layer_idx: int = 0
    layers: int = 1


@dataclass(frozen=True)
class NewValues:
    """Values `(B, Hkv, T, Dv)` on their way into a cache, and the layer's input `(B, T, hidden_size)` behind them."""

    value: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Block:
    """Which samples and queries, and the range of keys that any of them sees."""

    batch: slice
    rows: slice
    columns: slice

    def dropped(self, weights: Tensor, inputs: Inputs, seed: int) -> Tensor:
        """Dropout on the block's weights, or on their gradient: the same mask for the same seed."""
        generator = torch.Generator(weights.device).manual_seed(
            seed + self.rows.start + self.batch.start * inputs.query.shape[2]
        )
        stays = torch.rand(weights.shape, device=weights.device, generator=generator)
        return weights * (stays >= inputs.dropout) / (1 - inputs.dropout)


class State:
    """What a recurrent variant knows of a text between two calls, instead of its keys and values.

    Attributes:
        tensors: of the variant's choice, the batch first; none before the first call.
        seen: tokens so far, padding included.
        real: how many of them were no padding, `(B,)`; None before the first call.
    """

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self.seen = 0
        self.real: Tensor | None = None

    def copy(self) -> State:
        """The same state; what later calls do to either is not seen in the other."""
        other = State()
        other.tensors, other.seen, other.real = self.tensors, self.seen, self.real
        return other

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor, as reordering the batch or moving to another device does."""
        self.tensors = tuple(map(change, self.tensors))
        self.real = None if self.real is None else change(self.real)


Observer = Callable[["Inputs", Block, Tensor, Tensor], None]
"""Gets the call's inputs, a block, its weights `(B, H, Q, K)` and its mask, bool, broadcastable to them."""


class AttentionMap:
    """An observer that puts the blocks together: `(B, H, Q, K)`, for callers who ask for the map itself."""

    def __init__(self) -> None:
        self.whole: Tensor | None = None

    def __call__(self, inputs: Inputs, block: Block, weights: Tensor, keep: Tensor) -> None:
        shape = (*inputs.query.shape[:3], inputs.key.shape[2])
        if weights.shape == shape:
            self.whole = weights  # the very tensor, so that gradients reach it
            return
        if self.whole is None:
            self.whole = weights.new_zeros(shape)
        self.whole[block.batch, :, block.rows, block.columns] = weights.detach()


@dataclass(frozen=True)
class Inputs:
    """One attention call.

    Attributes:
        query: `(B, H, Q, D)`.
        key: `(B, Hkv, K, D)`; query head h reads key head `h // (H // Hkv)`.
        value: `(B, Hkv, K, Dv)`.
        keep: bool `(1|B, 1|H, Q, K)`, True where a query may see a key; None: causal, the last query sees all keys.
        scaling: factor of `query · key`.
        softcap: scores become `softcap · tanh(scores / softcap)`.
        bias: float, broadcastable to `(B, H, Q, K)`, added to the scores.
        slopes: `(H,)`, adds `slopes · (m - n)`, m the index of the query's own key, n that of the key (ALiBi).
        window: a query sees only the `window` latest of its keys, its own one included.
        hidden: the layer's input `(B, Q, hidden_size)`, for variants with `needs_hidden`.
        causal: the own key of a query is the last one it sees; otherwise the one at its own index (encoders).
        dropout: probability with which a weight is dropped and the others grow, in training.
        tempered: `value` has gone through `AttentionSpec.temper_values` before it entered a cache.
        observe: called with every block of weights, see `Observer`; nothing is fused then.
        compiled: False keeps the C++ kernel and flex_attention out.
        trace: told which engine would run the call, see `engines.Choice`; the plain definition runs instead.
        form: "quadratic", "chunked" or "recurrent", for variants with `has_state`; None: what suits the call.
        state: of a variant with `has_state`: what came before `key`, and what is left of it afterwards.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None
    scaling: float
    softcap: float | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    window: int | None = None
    hidden: Tensor | None = None
    causal: bool = True
    dropout: float = 0.0
    tempered: bool = False
    observe: Observer | None = None
    compiled: bool = True
    trace: Callable[[Any], None] | None = None
    form: str | None = None
    state: State | None = None

    def replace(self, **changes: Any) -> Inputs:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def n_keys(self) -> Tensor:
        """How many keys each query sees, `(1|B, 1|H, Q, 1)` int64; from the mask, never from positions."""
        if self.keep is not None:
            return self.keep.sum(-1, keepdim=True)
        queries, keys = self.query.shape[2], self.key.shape[2]
        seen = torch.arange(keys - queries + 1, keys + 1, device=self.query.device)
        return seen.view(1, 1, -1, 1)


class RowMapper(Protocol):
    """What an engine may ask of a variant; see `AttentionSpec` for each."""

    def row_map(self) -> RowMap | None: ...

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm | None: ...

    def sink_logits(self, inputs: Inputs, params: Params) -> Tensor | None: ...

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor: ...

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


class Call(NamedTuple):
    """`spec.weights(scores) @ value`, for an engine to compute."""

    spec: RowMapper
    inputs: Inputs
    params: Params


def wide(x: Tensor) -> Tensor:
    """fp32, or float64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_key(inputs: Inputs) -> Tensor:
    """Index of each query's own key, `(1|B, 1|H, Q)`."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    if inputs.causal and inputs.keep is not None:
        return keys - 1 - inputs.keep.int().flip(-1).argmax(-1)
    return torch.arange(keys - queries, keys, device=inputs.query.device).view(1, 1, -1)


def visible_keys(inputs: Inputs) -> Tensor:
    """How many keys each query sees, window included, `(1|B, 1|H, Q)` float32, at least 1."""
    seen = inputs.n_keys().squeeze(-1)
    if inputs.window is not None and inputs.keep is None:
        seen = seen.clamp(max=inputs.window)
    elif inputs.window is not None and inputs.keep is not None:
        distance = own_key(inputs).unsqueeze(-1) - torch.arange(
            inputs.key.shape[2], device=seen.device
        )
        seen = (inputs.keep & (distance < inputs.window)).sum(-1)
    return seen.clamp(min=1).float()


def per_row(inputs: Inputs, values: Tensor) -> Tensor:
    """`(1|B, 1|H, Q)` as a `(B, H, Q)` view that a `log_weight` can index."""
    return values.expand(*inputs.query.shape[:3])
