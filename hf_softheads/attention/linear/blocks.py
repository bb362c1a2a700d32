"""Blocks of tokens that begin where the text begins, wherever padding is; the latest are kept beside a state."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.attention.linear.forms import folded, repeated
from hf_softheads.attention.linear.past import Past

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Held = tuple[Tensor, ...]
"""The state `(B, H, F, E)` of whole blocks, keys and values after them `(B, Hkv, 2 · size, …)`, their number `(B,)`."""


def in_blocks(
    past: Past,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    run: Run,
    features: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`Σ w v` and `Σ w` of `run`, which is given whole texts from the beginning of a block on.

    Args:
        size: tokens of a block; two of them at most are kept as they are.
        run: query, key, value `(B, H, T, …)` and the state of all blocks before, to `(B, H, T, Dv + 1)`; the last
            column of the values is 1.
        features: keys `(B, Hkv, T, D)` to features `(B, H, T, F)`.
    """
    value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
    query = F.pad(query, (0, 0, past.keys - past.queries, 0))
    real = None if past.real is None else past.real[:, 0, :, 0].expand(len(query), -1)
    held = past.held()
    if past.form == "recurrent":
        outputs = []
        for t in range(past.keys):
            q, k, v = (x[:, :, t : t + 1] for x in (query, key, value))
            now = None if real is None else real[:, t : t + 1]
            out, held = _advance(held, q, k, v, now, size, run, features)
            outputs.append(out)
        out = torch.cat(outputs, 2)
    elif past.state is None:
        out = _read(held, query, key, value, real, run, features)[0]
    else:
        out, held = _advance(held, query, key, value, real, size, run, features)
    past.hold(held)
    out = out[:, :, past.keys - past.queries :]
    return out[..., :-1], out[..., -1:]


def _advance(
    held: Held,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    size: int,
    run: Run,
    features: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Held]:
    """The output, and what is held afterwards: blocks that no later window reaches are folded into the state."""
    out, key, value, count, state = _read(held, query, key, value, real, run, features)
    whole = (count // size - 1).clamp(min=0) * size
    leaving = torch.arange(key.shape[2], device=key.device) < whole.unsqueeze(-1)
    entering = value.masked_fill(~leaving[:, None, :, None], 0.0)
    mapped = features(key)
    state = folded(mapped, repeated(entering, mapped.shape[1]), None, state)
    kept = whole.unsqueeze(-1) + torch.arange(2 * size, device=key.device)
    kept = kept.clamp(max=key.shape[2] - 1)
    return out, (state, _take(key, kept), _take(value, kept), count - whole)


def _read(
    held: Held,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    run: Run,
    features: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output of the new tokens; and keys, values, their number, the state before them; padding comes last."""
    batch, heads, new, _ = query.shape
    if held:
        state, old_keys, old_values, old = held
        places = torch.arange(old_keys.shape[2], device=key.device) < old.unsqueeze(-1)
        fresh = (
            torch.ones(batch, new, dtype=torch.bool, device=key.device) if real is None else real
        )
        real = torch.cat([places, fresh], 1)
        query = F.pad(query, (0, 0, old_keys.shape[2], 0))
        key, value = torch.cat([old_keys, key], 2), torch.cat([old_values, value], 2)
    else:
        width = features(key[:, :, :1]).shape[-1]
        state = key.new_zeros(batch, heads, width, value.shape[-1])
    if real is None:
        count = torch.full((batch,), new, device=key.device)
        out = run(query, repeated(key, heads), repeated(value, heads), state)
        return out, key, value, count, state
    order = (~real).int().argsort(dim=1, stable=True)
    query, key, value = (_take(x, order) for x in (query, key, value))
    out = run(query, repeated(key, heads), repeated(value, heads), state)
    out = _take(out, order.argsort(1)).masked_fill(~real[:, None, :, None], 0.0)
    return out[:, :, -new:], key, value, real.sum(1), state


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens `places (B, T)` of `(B, H, …, X)`."""
    index = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index)
