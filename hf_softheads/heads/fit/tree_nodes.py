"""Rows and shifts of the nodes of a binary tree from a trained dense head, a subtree at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.fit.blockwise import over_states, progress, scores_of

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_STATES = 4096  # hidden states that the nodes are fitted to
_LEAVES = 4096  # of a subtree that is fitted at once
_ELEMENTS = 2**22  # numbers held at once by the fit
_RIDGE = 1e-3  # of the mean variance of the states
_FEW = 16.0  # states' worth of curvature that hold a node's row near its start


@torch.no_grad()
def fit_tree(
    order: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: float,
    stats: HeadStats | None,
    passes: int,
    store: Callable[[Tensor, Tensor], None],
) -> int:
    """Fit all nodes of the tree whose leaf `V + i` is the token `order[i]`; to how many hidden states it did.

    Subtrees of at most `_LEAVES` tokens one after the other, then the tree above them, whose leaves they are.

    Args:
        weight: `(V, D)`; bias: `(V,)`; `gain` times their scores are the dense logits.
        passes: Newton steps; with 0, or without statistics, the tangents stay.
        store: gets nodes `(n,)`, numbered from 1, and their rows and shifts `(n, D + 1)`.
    """
    vocab, dim = weight.shape
    newton = None
    if stats is not None and passes:

        def total(h: Tensor) -> Tensor:
            return (gain * scores_of(h, weight, bias)).logsumexp(-1)

        states = stats.states[:_STATES].to(weight.device)
        newton = _Newton(states, over_states(total, states, vocab, "nodes"), passes)

    def of_tokens(tokens: Tensor) -> _Leaves:
        rows = gain * weight[tokens].float()
        shifts = torch.zeros_like(rows[:, 0]) if bias is None else gain * bias[tokens].float()
        scores = None if newton is None else F.linear(newton.states, rows, shifts)
        return _Leaves(rows, shifts, *_means(tokens, dim, stats), scores)

    def fit(nodes: Tensor, leaves: _Leaves) -> None:
        found = _tangents(leaves)
        if newton is not None and leaves.scores is not None:
            found = newton(found, leaves.scores)
        store(nodes, found)

    height = 0  # of the tree above the subtrees
    while vocab >> height > _LEAVES // 2:
        height += 1
    roots = range(2**height, 2 ** (height + 1))
    subtrees = [tuple(part.to(weight.device) for part in _below(n, vocab)) for n in roots]
    above = _Leaves.empty(height, dim, newton, weight.device)
    for i, (_, places) in enumerate(subtrees):
        centers, mass = _means(order[places], dim, stats)
        above.mass[i] = mass.sum()
        above.centers[i] = mass @ centers / above.mass[i].clamp_min(1e-30)
    middles = _middles(above.centers, above.mass)
    for i, (nodes, places) in enumerate(progress(subtrees, "subtrees")):
        leaves = of_tokens(order[places])
        fit(nodes, leaves)
        ancestors = [roots[i] >> up for up in range(height, 0, -1)]
        above.rows[:, i], above.shifts[:, i] = leaves.tangents(middles[ancestors])
        if above.scores is not None and leaves.scores is not None:
            above.scores[:, i] = leaves.scores.logsumexp(-1)
    if height:
        fit(torch.arange(1, 2**height, device=weight.device), above)
    return 0 if newton is None else len(newton.states)


class _Leaves(NamedTuple):
    """What a tree is fitted to, for each of its leaves: tokens, or whole subtrees."""

    rows: Tensor  # `row · h + shift` is the log-mass under the dense head, for a token, (n, D),
    shifts: Tensor  # (n,); for a subtree its tangents at the middles above it from the root on, (height, n, D or -)
    centers: Tensor  # mean hidden state, (n, D)
    mass: Tensor  # mean probability, (n,)
    scores: Tensor | None  # exact log-mass of each at the hidden states, (S, n)

    @classmethod
    def empty(cls, height: int, dim: int, newton: _Newton | None, device: torch.device) -> _Leaves:
        """For the subtrees under a tree of this height, before they are fitted: not to lie between their matrices."""
        count = 2**height
        scores = None if newton is None else newton.total.new_empty(len(newton.states), count)
        return cls(
            torch.empty(height, count, dim, device=device),
            torch.empty(height, count, device=device),
            torch.empty(count, dim, device=device),
            torch.empty(count, device=device),
            scores,
        )

    def tangents(self, middles: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and shifts of the tangents of their `log Σ exp` at some points `(n, D)`."""
        z = middles @ self.rows.T + self.shifts
        rows = z.softmax(-1) @ self.rows
        return rows, z.logsumexp(-1) - (rows * middles).sum(-1)


def _means(tokens: Tensor, dim: int, stats: HeadStats | None) -> tuple[Tensor, Tensor]:
    """Mean hidden states of tokens, `(n, D)`, and their mean probabilities, `(n,)`; 0 and 1 without statistics."""
    if stats is None:
        one = torch.ones(len(tokens), device=tokens.device)
        return one.new_zeros(len(tokens), dim), one
    where = tokens.to(stats.mean_prob.device)
    found = stats.prob_weighted_mean[where], stats.mean_prob[where]
    return found[0].to(tokens.device).float(), found[1].to(tokens.device).float()


def _middles(centers: Tensor, mass: Tensor) -> Tensor:
    """Mean hidden state of every node of a tree with these leaves, `(2 n, D)`; 0 in place 0."""
    total = torch.cat([torch.zeros_like(mass), mass])
    where = torch.cat([torch.zeros_like(centers), centers * mass[:, None]])
    for nodes in _levels(len(mass)):
        first = torch.arange(nodes.start, nodes.stop, device=mass.device)
        total[first] = total[2 * first] + total[2 * first + 1]
        where[first] = where[2 * first] + where[2 * first + 1]
    return where / total.clamp_min(1e-30)[:, None]


def _below(node: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Inner nodes and leaves (places in `order`) of the subtree of a node, as a tree of its own numbers them."""
    numbers = []
    count = 1
    while node < 2 * vocab:
        numbers.append(torch.arange(node, min(node + count, 2 * vocab)))
        node, count = 2 * node, 2 * count
    found = torch.cat(numbers)
    return found[found < vocab], found[found >= vocab] - vocab


def _levels(vocab: int) -> Iterator[range]:
    """Nodes of each level from the bottom to the root, without leaves."""
    top = vocab - 1
    while top:
        bottom = 2 ** (top.bit_length() - 1)
        yield range(bottom, top + 1)
        top = bottom - 1


def _tangents(leaves: _Leaves) -> Tensor:
    """Each node's row and shift, `(n - 1, D + 1)`: the tangent of its log-odds at the mean hidden state below it."""
    count, dim = leaves.centers.shape
    device = leaves.mass.device
    middles = _middles(leaves.centers, leaves.mass)
    found = torch.empty(count - 1, dim + 1, device=device)
    node = torch.arange(count, 2 * count, device=device)  # of each leaf, one level up at a time
    for nodes in _levels(count):
        depth = nodes.start.bit_length() - 1
        rows = leaves.rows if leaves.rows.ndim == 2 else leaves.rows[depth]
        shifts = leaves.shifts if leaves.shifts.ndim == 1 else leaves.shifts[depth]
        here = node >= 2 * nodes.start  # shallow leaves join at the second level
        child, own = node[here], rows[here]
        parent = child >> 1
        z = (own * middles[parent]).sum(-1) + shifts[here]
        log_mass = torch.full((2 * count,), -torch.inf, device=device)
        log_mass = log_mass.scatter_reduce(0, child, z, "amax")
        share = (z - log_mass[child]).exp()
        log_mass = log_mass + torch.zeros_like(log_mass).index_add_(0, child, share).log()
        side = torch.where(child % 2 == 0, 1.0, -1.0) * (z - log_mass[child]).exp()
        slope = torch.zeros_like(middles).index_add_(0, parent, own * side[:, None])
        level = torch.arange(nodes.start, nodes.stop, device=device)
        odds = log_mass[2 * level] - log_mass[2 * level + 1]
        found[level - 1, :-1] = slope[level]
        found[level - 1, -1] = odds - (slope[level] * middles[level]).sum(-1)
        node = torch.where(here, node >> 1, node)
    return found


class _Newton:
    """Every node is a logistic regression of its own; all take damped Newton steps with one shared metric.

    A node's weight of a state is the dense probability of its tokens. Where a step does not lower a node's loss it
    is taken back and the node goes on with half of it.
    """

    def __init__(self, states: Tensor, total: Tensor, passes: int):
        self.states, self.total, self.passes = states, total, passes
        self.inputs = F.pad(states, (0, 1), value=1.0)
        metric = self.inputs.T @ self.inputs / len(states)
        metric += _RIDGE * metric.diagonal().mean() * torch.eye(len(metric), device=metric.device)
        self.metric, self.inverse = metric, torch.linalg.inv(metric.double()).float()

    def __call__(self, start: Tensor, scores: Tensor) -> Tensor:
        """Rows and shifts of the nodes, `(n - 1, D + 1)`, over leaves of these log-masses `(S, n)`."""
        count = scores.shape[1]
        size = max(1, _ELEMENTS // (2 * count))
        now, kept = start.clone(), start.clone()
        least = torch.full((count - 1,), torch.inf, device=start.device)
        pace = torch.ones_like(least)
        step = torch.zeros_like(start)
        for turn in range(self.passes + 1):
            loss, slope, curve = (torch.zeros_like(t) for t in (least, start, least))
            for x, total, own in zip(
                *(t.split(size) for t in (self.inputs, self.total[:, None], scores)), strict=True
            ):
                mass = torch.cat([torch.zeros_like(own), own], 1)
                for nodes in _levels(count):
                    left = mass[:, 2 * nodes.start : 2 * nodes.stop : 2]
                    right = mass[:, 2 * nodes.start + 1 : 2 * nodes.stop : 2]
                    mass[:, nodes.start : nodes.stop] = torch.logaddexp(left, right)
                here = (mass[:, 1:count] - total).exp()
                wanted = (mass[:, 2::2] - mass[:, 1:count]).exp()  # of the left child
                odds = F.linear(x, now)
                guess = odds.sigmoid()
                loss += (here * (F.softplus(odds) - wanted * odds)).sum(0)
                slope += (here * (guess - wanted)).T @ x
                curve += (here * guess * (1 - guess)).sum(0)
            pull = now - start
            loss += _FEW / 2 * ((pull @ self.metric) * pull).sum(-1)
            better = loss <= least
            kept = torch.where(better[:, None], now, kept)
            least = torch.where(better, loss, least)
            fresh = (slope @ self.inverse + _FEW * pull) / (curve + _FEW)[:, None]
            step = torch.where(better[:, None], fresh, step)
            pace = torch.where(better, (1.5 * pace).clamp_max(1.0), pace / 2)
            if turn < self.passes:
                now = kept - pace[:, None] * step
        return kept
