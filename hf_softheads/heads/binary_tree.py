"""Hierarchical softmax over a binary tree of the tokens, converted from a trained dense head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import blocks
from hf_softheads.heads.fit.hessian import metric_root
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.heads.fit.tree_nodes import fit_tree
from hf_softheads.heads.fit.tree_order import bisected
from hf_softheads.registry import CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


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

    passes: CountOrZero = 8

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls()]

    def check(self, dim: int, vocab: int) -> None:
        if vocab < 2:
            raise ValueError(f"binary_tree needs a vocabulary of at least 2 tokens, got {vocab}")

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> BinaryTreeHead:
        return BinaryTreeHead(dim, vocab)

    @torch.no_grad()
    def fit(
        self, head: BinaryTreeHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        rows = weight
        if stats is not None:
            root = metric_root(stats, centred=True)[0].to(weight.device, torch.float32)
            rows = torch.empty_like(weight, dtype=torch.bfloat16)  # to choose directions by
            for part in blocks(len(weight)):
                rows[part] = weight[part].float() @ root
        order = bisected(rows)
        del rows
        head.order.copy_(order)

        def store(nodes: Tensor, found: Tensor) -> None:
            head.weight[nodes - 1] = found[:, :-1].to(head.weight.dtype)
            head.shift[nodes - 1] = found[:, -1].to(head.shift.dtype)

        gain = head.logit_scale
        head.states.fill_(fit_tree(order, weight, bias, gain, stats, self.passes, store))


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

    def index_limits(self) -> dict[str, int]:
        return {"order": self.out_features}

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
