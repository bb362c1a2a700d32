"""Hierarchical softmax over a binary tree of the tokens, converted from a trained dense head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec, index_dtype
from hf_softheads.heads.fitting import blocks, over_states, progress, scores_of
from hf_softheads.heads.metric import metric_root
from hf_softheads.kmeans import require_finite

if TYPE_CHECKING:
    from hf_softheads.stats import HeadStats

_STATES = 4096  # hidden states that the nodes are fitted to
_LEAVES = 4096  # of a subtree that is fitted at once
_ELEMENTS = 2**22  # numbers held at once by the fit
_POWER_STEPS = 8  # towards the direction in which a node's tokens differ most
_RIDGE = 1e-3  # of the mean variance of the states
_FEW = 16.0  # states' worth of curvature that hold a node's row near its start


@dataclass(frozen=True)
class BinaryTree(HeadSpec, name="binary_tree"):
    """`p(v | h) = Π σ(± (weight_n · h + shift_n))` over the nodes n on the path from the root to v.

    Source: Morin & Bengio 2005; Mnih & Hinton 2008. Reads `log₂ V` rows of V - 1 for a training step or an exact
    sample, all of them for all probabilities or the best token. Trained by its exact loss, or through
    `losses.NegativeSampling`, which reads the paths of the label and of the sampled tokens.

    Converted, not trained: tokens are split in halves along the direction in which their rows differ most, so that
    neighbours are alike; a node's exact score is the difference of the `log Σ exp` of its two halves. Its row starts
    as the tangent of that at the node's mean hidden state (at 0 without `HeadStats`), which is exact for a pair of
    tokens, and is then fitted by `passes` damped Newton steps to the dense head's probabilities on sampled states.
    Subtrees of some thousand tokens are fitted one after the other, then the tree above them, whose leaves they are.

    Attributes:
        passes: over the sampled hidden states; 0 keeps the tangents.
    """

    passes: int = 8

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls()]

    def check(self, dim: int, vocab: int) -> None:
        if vocab < 2 or self.passes < 0:
            raise ValueError(
                f"binary_tree asked for {self.passes} passes over a vocabulary of {vocab}; at least 0 passes and "
                "2 tokens are possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> BinaryTreeHead:
        return BinaryTreeHead(dim, vocab)

    @torch.no_grad()
    def fit(
        self, head: BinaryTreeHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        gain = head.logit_scale
        rows = weight
        if stats is not None:
            root = metric_root(stats, centred=True)[0].to(weight.device, torch.float32)
            rows = torch.empty_like(weight, dtype=torch.bfloat16)  # to choose directions by
            for part in blocks(len(weight)):
                rows[part] = weight[part].float() @ root
        order = bisected(rows)
        del rows
        head.order.copy_(order)
        newton = None
        if stats is not None and self.passes:
            states = stats.states[:_STATES].to(weight.device)
            newton = _Newton(states, self._total(states, head, weight, bias), self.passes)

        def of_tokens(tokens: Tensor) -> _Leaves:
            rows = gain * weight[tokens].float()
            shifts = torch.zeros_like(rows[:, 0]) if bias is None else gain * bias[tokens].float()
            scores = None if newton is None else F.linear(newton.states, rows, shifts)
            return _Leaves(rows, shifts, *_means(tokens, rows.shape[1], stats), scores)

        vocab, dim = weight.shape
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
            self._install(head, nodes, leaves, newton)
            ancestors = [roots[i] >> up for up in range(height, 0, -1)]
            above.rows[:, i], above.shifts[:, i] = leaves.tangents(middles[ancestors])
            if above.scores is not None and leaves.scores is not None:
                above.scores[:, i] = leaves.scores.logsumexp(-1)
        if height:
            nodes = torch.arange(1, 2**height, device=weight.device)
            self._install(head, nodes, above, newton)
        head.states.fill_(0 if newton is None else len(newton.states))

    @staticmethod
    def _total(states: Tensor, head: BinaryTreeHead, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`log Σ exp` of the dense logits of each state."""

        def chunk(h: Tensor) -> Tensor:
            return (head.logit_scale * scores_of(h, weight, bias)).logsumexp(-1)

        return over_states(chunk, states, len(weight), "nodes")

    @staticmethod
    def _install(
        head: BinaryTreeHead, nodes: Tensor, leaves: _Leaves, newton: _Newton | None
    ) -> None:
        found = _tangents(leaves)
        if newton is not None and leaves.scores is not None:
            found = newton(found, leaves.scores)
        head.weight[nodes - 1] = found[:, :-1].to(head.weight.dtype)
        head.shift[nodes - 1] = found[:, -1].to(head.shift.dtype)


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


def bisected(rows: Tensor) -> Tensor:
    """Tokens in the order of the leaves `V … 2V - 1`: each node's tokens are split where their rows differ most."""
    vocab = len(rows)
    levels = vocab.bit_length() - 1  # nodes 2^levels … are the last full level
    deep = vocab - 2**levels  # of which so many, from the left, are nodes with two leaves
    order = torch.arange(vocab, device=rows.device)
    for level in progress(range(levels), "tree"):
        edges = torch.arange(2**level + 1) * 2 ** (levels - level)
        edges = edges + edges.clamp_max(deep)
        # as many whole segments at once as make a block
        size = max(1, _LEAVES >> (levels - level))
        for first in range(0, 2**level, size):
            some = edges[first : first + size + 1].to(rows.device)
            here = slice(int(some[0]), int(some[-1]))
            order[here] = order[here][_split(rows, order[here], some.diff())]
    return order.roll(
        -2 * deep
    )  # the two-leaf nodes lie left in the tree, their leaves are numbered last


def _split(rows: Tensor, order: Tensor, sizes: Tensor) -> Tensor:
    """Places of the rows `order` that sort each segment of so many along its direction of largest variance."""
    segment = torch.arange(len(sizes), device=rows.device).repeat_interleave(sizes)

    def sums(function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        total = torch.zeros(len(sizes), rows.shape[1], device=rows.device)
        for part in blocks(len(order)):
            own = function(rows[order[part]].float(), part)
            total.index_add_(0, segment[part], own)
        return total

    mean = sums(lambda own, _: own) / sizes[:, None]
    direction = torch.randn(mean.shape[1], generator=torch.Generator().manual_seed(0)).to(mean)
    direction = direction.expand_as(mean)
    along = torch.empty(len(order), device=rows.device)

    def weighted(own: Tensor, part: slice) -> Tensor:
        own = own - mean[segment[part]]
        along[part] = (own * direction[segment[part]]).sum(-1)
        return own.mul_(along[part, None])

    for _ in range(_POWER_STEPS):
        direction = F.normalize(sums(weighted), dim=-1)
    sums(weighted)
    inside = along.argsort(stable=True)
    return inside[segment[inside].argsort(stable=True)]


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
        now, kept = start.clone(), start.clone()
        least = torch.full((count - 1,), torch.inf, device=start.device)
        pace = torch.ones_like(least)
        step = torch.zeros_like(start)
        for turn in range(self.passes + 1):
            loss, slope, curve = (torch.zeros_like(t) for t in (least, start, least))
            for part in _parts(len(scores), _ELEMENTS // (2 * count)):
                x, total = self.inputs[part], self.total[part, None]
                mass = torch.cat([torch.zeros_like(scores[part]), scores[part]], 1)
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


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, max(1, size)):
        yield slice(start, start + max(1, size))


def _along(odds: Tensor, side: Tensor) -> Tensor:
    """Log-probability of the way that `side` tells through nodes of these log-odds, summed over the last axis."""
    return (F.logsigmoid(side * odds) * side.abs()).sum(-1)


class BinaryTreeHead(Head):
    """`weight (V - 1, D)` and `shift (V - 1,)` of nodes 1 … V - 1; node n has the children 2n and 2n + 1, and the leaf
    V + i is the token `order[i]`."""

    keep_in_fp32 = ("shift",)

    def __init__(self, dim: int, vocab: int):
        super().__init__(dim, vocab)
        self.weight = nn.Parameter(torch.empty(vocab - 1, dim))
        self.shift = nn.Parameter(torch.empty(vocab - 1))
        self.order: Tensor
        self.states: Tensor
        self.register_buffer("order", torch.arange(vocab).to(index_dtype(vocab)))
        self.register_buffer("states", torch.zeros(1, dtype=torch.int32))  # fitted to so many

    def scores(self, hidden: Tensor) -> Tensor:
        odds = F.linear(hidden, self.weight).float() + self.shift
        vocab, first = self.out_features, 1
        level = odds.new_zeros(*odds.shape[:-1], 1)
        leaves = []
        while True:
            inner = max(0, min(vocab - first, level.shape[-1]))  # the rest of this level are leaves
            leaves.append(level[..., inner:])
            if not inner:
                break
            own = odds[..., first - 1 : first - 1 + inner]
            above = level[..., :inner]
            pair = (above + F.logsigmoid(own), above + F.logsigmoid(-own))
            level = torch.stack(pair, -1).flatten(-2)
            first *= 2
        return torch.cat(leaves, -1).index_select(-1, self._places()) / self.logit_scale

    def score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        nodes, side = self._paths(tokens)
        rows = self.weight[nodes - 1]
        odds = torch.einsum("...mld,...d->...ml", rows, hidden.to(rows.dtype)).float()
        return _along(odds + self.shift[nodes - 1], side) / self.logit_scale

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        nodes, side = self._paths(tokens)
        nodes, where = nodes.unique(return_inverse=True)
        odds = F.linear(hidden, self.weight[nodes - 1]).float() + self.shift[nodes - 1]
        return _along(odds[..., where], side) / self.logit_scale

    def _paths(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes above the tokens, `(…, depth)`, and the side on which each is left: 1, -1, 0 above the root."""
        node = self._places()[tokens].long() + self.out_features
        nodes, sides = [], []
        for _ in range((2 * self.out_features - 1).bit_length() - 1):
            parent = node >> 1
            sides.append((1 - 2 * (node % 2)) * (parent > 0))
            node = parent.clamp_min(1)
            nodes.append(node)
        return torch.stack(nodes, -1), torch.stack(sides, -1)

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self._known_transform().scale is None:
            return super().log_prob(hidden, labels)

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            return self.score(h, y[:, None]).squeeze(-1) * self.logit_scale

        depth = self.out_features.bit_length()
        return self._in_chunks(chunk, hidden, labels, width=2 * depth * self.in_features)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        if temperature != 1.0 or self._known_transform().scale is None:
            return super().sample(hidden, temperature=temperature, generator=generator)
        vocab = self.out_features

        def chunk(h: Tensor) -> Tensor:
            node = torch.ones(len(h), dtype=torch.long, device=h.device)
            while int(node.min()) < vocab if len(h) else False:
                row = (node - 1).clamp_max(vocab - 2)
                odds = (self.weight[row] * h).sum(-1).float() + self.shift[row]
                u = torch.rand(len(h), generator=generator, device=h.device)
                child = 2 * node + (u >= odds.sigmoid()).long()
                node = torch.where(node < vocab, child, node)
            return self.order[node - vocab].long()

        return self._in_chunks(chunk, hidden, width=2 * self.in_features)

    def _places(self) -> Tensor:
        order = self.order
        return self._derived("places", lambda: order.long().argsort().int(), order)

    def notes(self) -> list[str]:
        if int(self.states):
            return [f"nodes fitted to {int(self.states)} hidden states"]
        return [
            "node rows are tangents, not fitted to hidden states (needs stats=… and passes of at least 1)"
        ]
