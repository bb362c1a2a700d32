"""Hierarchical softmax over a binary tree of the tokens, converted from a trained dense head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec, index_dtype
from hf_softheads.heads.fitting import blocks
from hf_softheads.heads.metric import metric_root
from hf_softheads.kmeans import require_finite

if TYPE_CHECKING:
    from hf_softheads.stats import HeadStats

_STATES = 4096  # hidden states that the nodes are fitted to
_ELEMENTS = 2**24  # numbers held at once by the fit
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
    The fit holds the matrix in fp32 several times: for vocabularies of some ten thousand tokens.

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
        root = None if stats is None else metric_root(stats, centred=True)[0]
        rows = torch.empty(weight.shape, device=weight.device)
        for which in blocks(len(weight)):
            part = weight[which].float()
            rows[which] = part if root is None else part @ root.to(part)
        order = bisected(rows)
        head.order.copy_(order)
        for which in blocks(len(weight)):
            rows[which] = gain * weight[order[which]].float()
        leaf_bias = torch.zeros_like(rows[:, 0]) if bias is None else gain * bias[order]
        centers, mass = torch.zeros_like(rows), torch.ones_like(leaf_bias)
        if stats is not None:
            centers = stats.prob_weighted_mean.to(weight.device)[order]
            mass = stats.mean_prob.to(weight.device)[order]
        _tangents(head, rows, leaf_bias, centers, mass)
        head.states.zero_()
        if stats is not None and self.passes:
            states = stats.states[:_STATES].to(weight.device)
            _newton(head, rows, leaf_bias, states, self.passes)
            head.states.fill_(len(states))


def bisected(rows: Tensor) -> Tensor:
    """Tokens in the order of the leaves `V … 2V - 1`: each node's tokens are split where their rows differ most."""
    vocab = len(rows)
    levels = vocab.bit_length() - 1  # nodes 2^levels … are the last full level
    deep = vocab - 2**levels  # of which so many, from the left, are nodes with two leaves
    order = torch.arange(vocab, device=rows.device)
    for level in range(levels):
        edges = torch.arange(2**level + 1) * 2 ** (levels - level)
        sizes = (edges + edges.clamp_max(deep)).diff().to(rows.device)
        segment = torch.arange(2**level, device=rows.device).repeat_interleave(sizes)
        own = rows[order]
        sums = own.new_zeros(2**level, rows.shape[1]).index_add_(0, segment, own)
        own = own - (sums / sizes[:, None])[segment]
        direction = torch.randn(sums.shape, generator=torch.Generator().manual_seed(level))
        direction = direction.to(rows)
        for _ in range(_POWER_STEPS):
            along = (own * direction[segment]).sum(-1, keepdim=True)
            direction = torch.zeros_like(sums).index_add_(0, segment, own * along)
            direction = F.normalize(direction, dim=-1)
        along = (own * direction[segment]).sum(-1)
        inside = along.argsort(stable=True)
        order = order[inside[segment[inside].argsort(stable=True)]]
    return order.roll(
        -2 * deep
    )  # the two-leaf nodes lie left in the tree, their leaves are numbered last


def _levels(vocab: int) -> Iterator[range]:
    """Nodes of each level from the bottom to the root, without leaves."""
    top = vocab - 1
    while top:
        bottom = 2 ** (top.bit_length() - 1)
        yield range(bottom, top + 1)
        top = bottom - 1


def _tangents(
    head: BinaryTreeHead, rows: Tensor, bias: Tensor, centers: Tensor, mass: Tensor
) -> None:
    """Each node's row and shift from the tangent of its log-odds at the mean hidden state of its tokens."""
    vocab = len(rows)
    total = torch.cat([torch.zeros_like(mass), mass])
    where = torch.cat([torch.zeros_like(centers), centers * mass[:, None]])
    for nodes in _levels(vocab):
        first = torch.arange(nodes.start, nodes.stop, device=rows.device)
        total[first] = total[2 * first] + total[2 * first + 1]
        where[first] = where[2 * first] + where[2 * first + 1]
    node = torch.arange(
        vocab, 2 * vocab, device=rows.device
    )  # of each leaf, one level up at a time
    for nodes in _levels(vocab):
        here = node >= 2 * nodes.start  # shallow leaves join at the second level
        child, own = node[here], rows[here]
        parent = child >> 1
        middle = where[parent] / total[parent].clamp_min(1e-30)[:, None]
        z = (own * middle).sum(-1) + bias[here]
        log_mass = torch.full((2 * vocab,), -torch.inf, device=rows.device)
        log_mass = log_mass.scatter_reduce(0, child, z, "amax")
        share = (z - log_mass[child]).exp()
        log_mass = log_mass + torch.zeros_like(log_mass).index_add_(0, child, share).log()
        side = torch.where(child % 2 == 0, 1.0, -1.0) * (z - log_mass[child]).exp()
        slope = torch.zeros_like(where).index_add_(0, parent, own * side[:, None])
        level = torch.arange(nodes.start, nodes.stop, device=rows.device)
        odds = log_mass[2 * level] - log_mass[2 * level + 1]
        middle = where[level] / total[level].clamp_min(1e-30)[:, None]
        head.weight[level - 1] = slope[level].to(head.weight.dtype)
        head.shift[level - 1] = odds - (slope[level] * middle).sum(-1)
        node = torch.where(here, node >> 1, node)


def _newton(head: BinaryTreeHead, rows: Tensor, bias: Tensor, states: Tensor, passes: int) -> None:
    """Every node is a logistic regression of its own; all take damped Newton steps with one shared metric.

    A node's weight of a state is the dense probability of its tokens. Where a step does not lower a node's loss it
    is taken back and the node goes on with half of it.
    """
    vocab, dim = rows.shape
    inputs = F.pad(states, (0, 1), value=1.0)
    metric = inputs.T @ inputs / len(states)
    metric += _RIDGE * metric.diagonal().mean() * torch.eye(dim + 1, device=rows.device)
    inverse = torch.linalg.inv(metric.double()).float()
    start = torch.cat([head.weight.float(), head.shift[:, None].float()], 1)
    now, kept = start.clone(), start.clone()
    least = torch.full((vocab - 1,), torch.inf, device=rows.device)
    pace = torch.ones_like(least)
    step = torch.zeros_like(start)
    for turn in range(passes + 1):
        loss, slope, curve = (torch.zeros_like(t) for t in (least, start, least))
        for x in inputs.split(max(1, _ELEMENTS // (2 * vocab))):
            mass = torch.cat([x.new_zeros(len(x), vocab), F.linear(x[:, :-1], rows, bias)], 1)
            for nodes in _levels(vocab):
                left = mass[:, 2 * nodes.start : 2 * nodes.stop : 2]
                right = mass[:, 2 * nodes.start + 1 : 2 * nodes.stop : 2]
                mass[:, nodes.start : nodes.stop] = torch.logaddexp(left, right)
            here = (mass[:, 1:vocab] - mass[:, 1:2]).exp()
            wanted = (mass[:, 2::2] - mass[:, 1:vocab]).exp()  # of the left child
            odds = F.linear(x, now)
            guess = odds.sigmoid()
            loss += (here * (F.softplus(odds) - wanted * odds)).sum(0)
            slope += (here * (guess - wanted)).T @ x
            curve += (here * guess * (1 - guess)).sum(0)
        pull = now - start
        loss += _FEW / 2 * ((pull @ metric) * pull).sum(-1)
        better = loss <= least
        kept = torch.where(better[:, None], now, kept)
        least = torch.where(better, loss, least)
        fresh = (slope @ inverse + _FEW * pull) / (curve + _FEW)[:, None]
        step = torch.where(better[:, None], fresh, step)
        pace = torch.where(better, (1.5 * pace).clamp_max(1.0), pace / 2)
        if turn < passes:
            now = kept - pace[:, None] * step
    head.weight.copy_(kept[:, :-1])
    head.shift.copy_(kept[:, -1])


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
