"""What the fits of several heads share: matrices in blocks of rows, without an fp32 copy, and small searches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")

_ROWS = 4096  # of a matrix in fp32 at once
_LOGITS = 2**24  # numbers held at once: 64 MiB in fp32
_PATIENCE = 2  # seconds before a bar is shown
_PASSES = 10
_TRIED = 7  # numbers a pass
_RIDGE = 1e-3


def blocks(count: int) -> Iterator[slice]:
    """Slices of `count` rows, each few enough to be held in fp32 several times."""
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))


def progress(steps: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """`steps` with a progress bar on a terminal, shown after two seconds."""
    bar: Iterable[T] = tqdm(
        steps, description, total, disable=None, leave=False, delay=_PATIENCE, mininterval=0.5
    )
    return bar


def scores_of(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(states, weight, bias)` in fp32 for a weight of any dtype, `(S, V)`."""
    states = states.float()
    scores = states.new_empty(len(states), len(weight))
    for which in blocks(len(weight)):
        torch.mm(states, weight[which].float().T, out=scores[:, which])
    return scores if bias is None else scores.add_(bias)


def over_states(
    function: Callable[[Tensor], Tensor], states: Tensor, vocab: int, description: str
) -> Tensor:
    """`function` of hidden states, in parts as `in_chunks` cuts them, joined; with a bar.

    Results go to one place at once: small tensors that stay between large ones that go would fragment the memory.
    """
    found: Tensor | None = None
    start = 0
    for part in progress(list(in_chunks(states, vocab)), description):
        own = function(part)
        if found is None:
            found = own.new_empty((len(states), *own.shape[1:]))
        found[start : start + len(part)] = own
        start += len(part)
        del own
    assert found is not None
    return found


def in_chunks(states: Tensor, vocab: int) -> Iterator[Tensor]:
    """Hidden states `(S, D)` in parts so small that their logits can be held in fp32 several times."""
    yield from states.split(max(1, _LOGITS // vocab))


@torch.no_grad()
def minimize_scalar_convex(slope: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    """Where a convex function of a positive number is least: between two of several at which `slope` was asked for.

    `slope` takes numbers `(K,)` and gives the slopes there; the interval shrinks `K + 1` times a pass, on a
    logarithmic scale.
    """
    for _ in progress(range(_PASSES), "scale"):
        edges = torch.logspace(0, 1, _TRIED + 2, base=high / low, dtype=torch.float64) * low
        falling = int((slope(edges[1:-1].float()) < 0).sum())
        low, high = float(edges[falling]), float(edges[falling + 1])
    return float((low * high) ** 0.5)


@torch.no_grad()
def best_scale(
    parts: Callable[[], Iterable[tuple[Tensor, Tensor]]], low: float = 1e-3, high: float = 1e3
) -> float:
    """The s of least `E KL(wanted ‖ softmax(s · scores))`.

    `parts()` gives, again and again, the scores `(n, V)` of some states at a time and their mean under the wanted
    probabilities, `(n,)`.
    """

    def slope(scales: Tensor) -> Tensor:
        total = torch.zeros(len(scales), dtype=torch.float64)
        for scores, target in parts():
            for i, scale in enumerate(scales.tolist()):
                mean = (scores * scale).softmax(-1).mul_(scores).sum(-1)
                total[i] += float((mean - target).sum())
        return total

    return minimize_scalar_convex(slope, low, high)


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


def gumbel_choice(logits: Tensor, heat: float, generator: torch.Generator) -> Tensor:
    """One of the last axis, drawn by `softmax(logits / heat)` with Gumbel noise: hard forward, soft backward."""
    noise = torch.empty(logits.shape).exponential_(generator=generator).log().neg()
    soft = ((logits + noise.to(logits.device)) / heat).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).float()
    return hard + soft - soft.detach()
