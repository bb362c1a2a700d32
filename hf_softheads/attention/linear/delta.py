"""Three ways to compute the gated delta rule, `S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ`, `out_t = q_t S_t`.

A step is `S_t = α_t S_{t−1} + k_t u_tᵀ` with `u_t = β_t (v_t − α_t k_t S_{t−1})`. The u of several tokens solve a unit
lower triangular system, `(I + L) U = β V − β e^b K S_0`, `L_ij = β_i e^{b_i − b_j} k_i·k_j` for `j < i`, b the running
sum of `log α`: the whole text is one system in the quadratic form, 64 tokens in the chunked one.

Shapes: query and key `(B, H, T, F)`, value `(B, H, T, E)`, beta and log decay `(B, H, T)`, state `(B, H, F, E)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.attention.linear import forms
from hf_softheads.attention.linear.forms import faded, in_chunks


def quadratic(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, keep: Tensor
) -> Tensor:
    """For `Q ≤ K` queries, the last ones, and a mask between all keys, `(B, 1|H, K, K)`."""
    passed = log_decay.double().cumsum(-1)
    fading = faded(passed, passed, keep).to(key).masked_fill(~keep, 0.0)
    updates = _solve(key, beta, fading, beta.unsqueeze(-1) * value)
    queries = query.shape[2]
    out: Tensor = (query @ key.mT * fading[..., -queries:, :]) @ updates
    return out


def recurrent(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(query.shape[2]):
        k = key[:, :, t : t + 1]
        state = state * log_decay[:, :, t, None, None].exp()
        state = state + k.mT @ (beta[:, :, t, None, None] * (value[:, :, t : t + 1] - k @ state))
        outputs.append(query[:, :, t : t + 1] @ state)
    return torch.cat(outputs, 2), state


def chunked(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, size = query.shape[2], min(forms.CHUNK, query.shape[2])
    query, key, value = (in_chunks(x, size) for x in (query, key, value))
    beta, log_decay = (in_chunks(x.unsqueeze(-1), size).squeeze(-1) for x in (beta, log_decay))
    passed = log_decay.cumsum(-1)
    causal = torch.ones(size, size, dtype=torch.bool, device=key.device).tril()
    fading = faded(passed, passed, causal).tril()
    since, left = passed.exp().unsqueeze(-1), passed[..., -1:]
    right = beta.unsqueeze(-1) * torch.cat([value, since * key], -1)
    solved = _solve(key, beta, fading, right)
    fresh, erased = solved.split([value.shape[-1], key.shape[-1]], -1)
    scores = query @ key.mT * fading
    # out = scores (fresh − erased S) + e^b q S, and the next S = e^b S + kᵀ (fresh − erased S)
    entering = (key * (left - passed).exp().unsqueeze(-1)).mT
    own, reading = scores @ fresh, query * since - scores @ erased
    gained, lost, kept = entering @ fresh, entering @ erased, left.exp().unsqueeze(-1)
    states = []
    for keeps, gains, loses in zip(*(x.unbind(2) for x in (kept, gained, lost)), strict=True):
        states.append(state)
        state = keeps * state + gains - loses @ state
    out = own + reading @ torch.stack(states, 2)
    return out.flatten(2, 3)[:, :, :tokens], state


def _solve(key: Tensor, beta: Tensor, fading: Tensor, right: Tensor) -> Tensor:
    """`(I + L)⁻¹` times the right side."""
    lower = (beta.unsqueeze(-1) * (key @ key.mT) * fading).tril(-1)
    solved: Tensor = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    return solved
