"""Small fits that several heads share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 30
_RIDGE = 1e-3


@torch.no_grad()
def least_at(slope: Callable[[float], float], low: float, high: float) -> float:
    """Where a convex function of a positive number is least, by bisection of its slope on a logarithmic scale."""
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return float((low * high) ** 0.5)


@torch.no_grad()
def best_scale(scores: Tensor, wanted: Tensor, low: float = 1e-3, high: float = 1e3) -> float:
    """The s of least `E KL(wanted ‖ softmax(s · scores))`; `scores` and probabilities `wanted` are `(N, V)`."""
    target = (wanted * scores).sum(-1)

    def slope(scale: float) -> float:
        return float((((scale * scores).softmax(-1) * scores).sum(-1) - target).mean())

    return least_at(slope, low, high)


@torch.no_grad()
def linear_log_mass(states: Tensor, mass: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The row `(D,)` and shift `(1,)` whose `row · h + shift` is nearest to `mass (N,)` on hidden states `(N, D)`.

    `mass` and `total` are the `log Σ exp` of some logits and of all; squares are weighted by `s (1 - s)`, `s` their
    share, which makes it the least KL divergence to second order, and a little everywhere.
    """
    inputs = F.pad(states.float(), (0, 1), value=1.0)
    share = (mass - total).exp().clamp_max(1)
    weighted = inputs * (share * (1 - share) + 0.01)[:, None]
    gram = weighted.T @ inputs
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    found = torch.linalg.solve(gram, weighted.T @ mass)
    return found[:-1], found[-1:]


def linear_log_odds(
    states: Tensor, known: Tensor, mass: Tensor, *, steps: int = 50
) -> tuple[Tensor, Tensor]:
    """The row and shift of least KL divergence: `row · h + shift` in place of `mass (N,)`, beside `known (N,)`.

    Logistic regression of the share `exp mass / (exp known + exp mass)`, from `linear_log_mass` on.
    """
    start = torch.cat(linear_log_mass(states, mass, torch.logaddexp(known, mass)))
    inputs = F.pad(states.float(), (0, 1), value=1.0)
    share = (mass - known).sigmoid()
    penalty = 1e-4 * inputs.square().mean(0)
    with torch.enable_grad():
        found = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([found], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(inputs @ found - known, share)
            value = value + (penalty * (found - start).square()).sum()
            value.backward()
            return value

        optimizer.step(loss)
    found = found.detach()
    return found[:-1], found[-1:]
