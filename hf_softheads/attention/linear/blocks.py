"""Blocks of tokens that begin where the text begins, wherever padding is, and the latest tokens kept beside a state."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.linear.forms import folded, repeated
from hf_softheads.attention.linear.past import Past

Held = tuple[Tensor, ...]
"""The state `(B, H, F, E)`, the tokens after it, keys and values `(B, Hkv, kept, …)`, and their number `(B,)`."""


class Windowed(Protocol):
    """A window over the latest tokens, and a state of all before. The last column of values is 1."""

    @property
    def kept(self) -> int:
        """Tokens beside the state, with the next one, at most."""

    def leaving(self, count: Tensor) -> Tensor:
        """How many of `count` tokens no later query has in its window."""

    def features(self, key: Tensor) -> Tensor:
        """Of keys `(B, Hkv, T, D)`, as they enter the state: `(B, H, T, F)`."""

    def blocks(self, query: Tensor, key: Tensor, value: Tensor, state: Tensor) -> Tensor:
        """`Σ w v` for all tokens, `(B, H, T, …)`, that come after the state."""

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, here: Tensor, state: Tensor
    ) -> Tensor:
        """`Σ w v` for one query whose window is the keys that are `here (B, 1, 1, T)`."""


def windowed(past: Past, query: Tensor, key: Tensor, value: Tensor, w: Windowed) -> Tensor:
    """`Σ w v / Σ w`, `(B, H, Q, Dv)`; 0 for padding."""
    value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    query = F.pad(query, (0, 0, past.keys - past.queries, 0))
    real = None if past.real is None else past.real[:, 0, :, 0].expand(len(query), -1)
    held = past.held()
    if past.form == "recurrent":
        outputs = []
        for t in range(past.keys):
            q, k, v = (x[:, :, t : t + 1] for x in (query, key, value))
            out, held = _advance(held, q, k, v, None if real is None else real[:, t : t + 1], w)
            outputs.append(out)
        out = torch.cat(outputs, 2)
    elif past.state is None:
        out = _read(held, query, key, value, real, w)[0]
    else:
        out, held = _advance(held, query, key, value, real, w)
    past.hold(held)
    out = out[:, :, past.keys - past.queries :]
    total = out[..., -1:]
    return out[..., :-1] / total.masked_fill(total == 0, 1.0)


def _advance(
    held: Held, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, w: Windowed
) -> tuple[Tensor, Held]:
    """The output, and what is held afterwards: tokens that no later window reaches are folded into the state."""
    if held and query.shape[2] == 1:
        out, key, value, count, state = _step(held, query, key, value, real, w)
    else:
        out, key, value, count, state = _read(held, query, key, value, real, w)
    leaving = w.leaving(count)
    most = int(leaving.max())
    if most:
        gone = torch.arange(most, device=key.device) < leaving.unsqueeze(-1)
        entering = value[:, :, :most].masked_fill(~gone[:, None, :, None], 0.0)
        mapped = w.features(key[:, :, :most])
        state = folded(mapped, repeated(entering, mapped.shape[1]), None, state)
    kept = leaving.unsqueeze(-1) + torch.arange(w.kept, device=key.device)
    kept = kept.clamp(max=key.shape[2] - 1)
    return out, (state, _take(key, kept), _take(value, kept), count - leaving)


def _step(
    held: Held, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, w: Windowed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_read`, for one token."""
    state, keys, values, old = held
    place = old.view(-1, 1, 1, 1)
    keys = keys.scatter(2, place.expand(-1, *key.shape[1:]), key)
    values = values.scatter(2, place.expand(-1, *value.shape[1:]), value)
    here = torch.arange(keys.shape[2], device=key.device) <= place
    heads = query.shape[1]
    out = w.step(query, repeated(keys, heads), repeated(values, heads), here, state)
    if real is None:
        return out, keys, values, old + 1, state
    return out.masked_fill(~real[:, None, :, None], 0.0), keys, values, old + real[:, 0], state


def _read(
    held: Held, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, w: Windowed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output of the new tokens; and keys, values, their number, the state before them; padding comes last."""
    batch, heads, new, _ = query.shape
    if held:
        state, old_keys, old_values, old = held
        places = torch.arange(old_keys.shape[2], device=key.device) < old.unsqueeze(-1)
        fresh = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if real is None else real
        real = torch.cat([places, fresh], 1)
        query = F.pad(query, (0, 0, old_keys.shape[2], 0))
        key, value = torch.cat([old_keys, key], 2), torch.cat([old_values, value], 2)
    else:
        width = w.features(key[:, :, :1]).shape[-1]
        state = key.new_zeros(batch, heads, width, value.shape[-1])
    if real is None:
        count = torch.full((batch,), new, device=key.device)
        out = w.blocks(query, repeated(key, heads), repeated(value, heads), state)
        return out, key, value, count, state
    order = (~real).int().argsort(dim=1, stable=True)
    query, key, value = (_take(x, order) for x in (query, key, value))
    out = w.blocks(query, repeated(key, heads), repeated(value, heads), state)
    out = _take(out, order.argsort(1)).masked_fill(~real[:, None, :, None], 0.0)
    return out[:, :, -new:], key, value, real.sum(1), state


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens `places (B, T)` of `(B, H, …, X)`."""
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index)
