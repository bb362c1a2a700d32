"""Three ways to compute `Σ_j (φ(q_i)·φ(k_j)) v_j` over the keys `j ≤ i`: the matrix, chunks of it, token by token.

With a decay, key j has faded by `exp(b_i − b_j)` for query i, b the running sum of the log decays (at most 0). All
three start from a state `S = Σ φ(k) vᵀ`, `(B, G, F, E)`, of earlier keys, and return the one after the last key.

Shapes: query `(B, H, Q, F)`, key `(B, G, K, F)`, value `(B, G, K, E)`, log decay `(1|B, G, K)` or None; query head h
reads key head `h // (H // G)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64


class Kernel(NamedTuple):
    """`φ(q)·φ(k) = of(query·key)` of smaller queries and keys: cheaper than features within a chunk, and exact."""

    query: Tensor
    key: Tensor
    of: Callable[[Tensor], Tensor]

    def part(self, tokens: slice) -> Kernel:
        """The kernel of some tokens."""
        return self._replace(query=self.query[:, :, tokens], key=self.key[:, :, tokens])


def quadratic(weights: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """`(weights · keep) @ value` for weights `(B, H, Q, K)`: the definition."""
    return weights.masked_fill(~keep, 0.0) @ repeated(value, weights.shape[1])


def faded(decayed_query: Tensor, decayed_key: Tensor, keep: Tensor) -> Tensor:
    """`exp(b_i − b_j)` where `keep`, from running sums of log decays `(…, Q)` and `(…, K)`."""
    exponent = decayed_query.unsqueeze(-1) - decayed_key.unsqueeze(-2)
    return fade(exponent.masked_fill(~keep, 0.0))


def fade(exponent: Tensor) -> Tensor:
    """`exp`, and 0 below e⁻⁶⁰: numbers that end below the normal ones make a product ten times slower."""
    return exponent.exp().masked_fill(exponent < -60, 0.0)


def recurrent(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`S ← exp(g) S + φ(k) vᵀ`, `out = φ(q) S`, for one token after the other."""
    outputs = []
    for t in range(query.shape[2]):
        token = slice(t, t + 1)
        fading = None if log_decay is None else log_decay[..., token]
        state = folded(key[:, :, token], value[:, :, token], fading, state)
        outputs.append(read(query[:, :, token], state))
    return torch.cat(outputs, 2), state


def folded(key: Tensor, value: Tensor, log_decay: Tensor | None, state: Tensor) -> Tensor:
    """The state once all the keys have entered."""
    if log_decay is not None:
        passed = log_decay.cumsum(-1)
        left = passed[..., -1:]
        key = key * fade(left - passed).unsqueeze(-1)
        state = state * fade(left).unsqueeze(-1)
    return state + key.mT @ value


def read(query: Tensor, state: Tensor) -> Tensor:
    """`φ(q) S`, `(B, H, Q, E)`."""
    groups = state.shape[1]
    stacked = query.reshape(query.shape[0], groups, -1, query.shape[-1])
    return (stacked @ state).reshape(*query.shape[:3], -1)


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks of 64 tokens: a small matrix within each, the state between them. Time and memory are linear in Q = K."""
    tokens, groups = query.shape[2], key.shape[1]
    whole = tokens - tokens % CHUNK
    if 0 < whole < tokens:
        parts = []
        for some in (slice(0, whole), slice(whole, tokens)):
            q, k, v = query[:, :, some], key[:, :, some], value[:, :, some]
            passing = None if log_decay is None else log_decay[..., some]
            part = None if kernel is None else kernel.part(some)
            out, state = chunked(q, k, v, passing, state, part)
            parts.append(out)
        return torch.cat(parts, 2), state
    size = min(CHUNK, tokens)
    if log_decay is not None and log_decay.stride(-1) == 0:
        log_decay = log_decay[..., :size]  # one number for all tokens: all chunks are alike
    query, key, value = _rows(query, groups, size), in_chunks(key, size), in_chunks(value, size)
    if kernel is None:
        scores = query @ key.mT
    else:
        small = in_chunks(repeated(kernel.key, groups), size)
        scores = kernel.of(_rows(kernel.query, groups, size) @ small.mT)
    scores = scores.unflatten(-2, (-1, size))
    entering, carry = key, None
    if log_decay is None:
        scores = scores.tril()
    else:
        passed = in_chunks(log_decay.unsqueeze(-1), size).squeeze(-1).cumsum(-1)
        causal = torch.ones(size, size, dtype=torch.bool, device=key.device).tril()
        fading = faded(passed, passed, causal).tril()
        scores = scores * fading.unsqueeze(-3)
        left = passed[..., -1:]
        entering, carry = key * fade(left - passed).unsqueeze(-1), fade(left.squeeze(-1))
        query = (query.unflatten(-2, (-1, size)) * fade(passed)[..., None, :, None]).flatten(-3, -2)
    states = scan(entering.mT @ value, carry, state)
    out = scores.flatten(-3, -2) @ value + query @ states[:, :, :-1]
    out = out.unflatten(3, (-1, size)).transpose(2, 3).flatten(1, 2)  # (B, H, N, C, E)
    return out.flatten(2, 3), states[:, :, -1]


def scan(updates: Tensor, carry: Tensor | None, state: Tensor) -> Tensor:
    """`S_{n+1} = carry_n S_n + U_n` for updates `(B, G, N, F, E)` and carry `(1|B, G, 1|N)`: all `N + 1` states."""
    state = state.expand(updates[:, :, 0].shape)
    if torch.compiler.is_compiling():
        states = [state]
        for n in range(updates.shape[2]):
            kept = states[-1] if carry is None else states[-1] * _factor(carry, n)
            states.append(kept + updates[:, :, n])
        return torch.stack(states, 2)
    out: Tensor = _Scan.apply(updates, carry, state)
    return out


class _Scan(torch.autograd.Function):
    """The loop without a graph of its steps, which would cost more than the steps."""

    @staticmethod
    def forward(ctx: Any, updates: Tensor, carry: Tensor | None, state: Tensor) -> Tensor:
        steps = updates.shape[2]
        shape = (*updates.shape[:2], steps + 1, *updates.shape[3:])
        states = updates.new_empty(shape)
        states[:, :, 0] = state
        for n in range(steps):
            kept = states[:, :, n] if carry is None else states[:, :, n] * _factor(carry, n)
            torch.add(kept, updates[:, :, n], out=states[:, :, n + 1])
        ctx.save_for_backward(carry, states if ctx.needs_input_grad[1] else None)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        carry, states = ctx.saved_tensors
        steps = grad.shape[2] - 1
        dupdates = torch.empty_like(grad[:, :, 1:])
        dcarry = None if states is None else grad.new_empty(*grad.shape[:3])[:, :, 1:]
        running = grad[:, :, steps].clone()
        for n in reversed(range(steps)):
            dupdates[:, :, n] = running
            if dcarry is not None:
                dcarry[:, :, n] = (running * states[:, :, n]).sum((-2, -1))
            if carry is not None:
                running.mul_(_factor(carry, n))
            running.add_(grad[:, :, n])
        if dcarry is not None:
            dcarry = dcarry.sum_to_size(carry.shape)
        return dupdates, dcarry, running


def repeated(x: Tensor, heads: int) -> Tensor:
    """`(B, G, …)` with every head repeated for the query heads that read it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _factor(carry: Tensor, n: int) -> Tensor:
    return carry[:, :, min(n, carry.shape[2] - 1), None, None]


def _rows(query: Tensor, groups: int, size: int) -> Tensor:
    """Chunks of queries, the heads of a group as rows of one matrix: `(B, G, N, H/G · C, F)`."""
    grouped = in_chunks(query, size).unflatten(1, (groups, -1)).transpose(2, 3)
    rows: Tensor = grouped.flatten(3, 4)
    return rows


def in_chunks(x: Tensor, size: int) -> Tensor:
    """`(B, H, T, X)` as `(B, H, N, size, X)`; zeros fill the last chunk."""
    missing = -x.shape[2] % size
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    chunks: Tensor = padded.unflatten(2, (-1, size))
    return chunks
