"""Similarity, distance, magnitude: probabilities that know how near the calibration data is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import best_scale, in_chunks, over_states
from hf_softheads.heads.forms.wrapper import WrapperHead, WrapperSpec
from hf_softheads.registry import Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


class Evidence(NamedTuple):
    """What speaks for the best token of each hidden state, `(…)` each.

    Attributes:
        similarity: q, how many of the nearest exemplars, without a gap, had this token as prediction and as label.
        distance: d in (0, 1], the share of calibration states that are at least as far from their nearest exemplar.
        probability: of the best token.
        token: it.
    """

    similarity: Tensor
    distance: Tensor
    probability: Tensor
    token: Tensor


@dataclass(frozen=True)
class SDM(WrapperSpec, name="sdm"):
    """`p_v ∝ (2 + q)^(d · weight · z_v)`, z the inner head's logits: sure only where calibration data was right nearby.

    Source: Schmaltz 2025, arXiv 2509.12760. q counts consecutive nearest exemplars that were predicted rightly and as
    this state is; d falls with the distance to the nearest. `q = e - 2, d = 1` is the softmax. The best token stays, so
    greedy decoding is unchanged; `evidence` says how far to trust it. A verification head: every call compares
    with all exemplars.

    Needs `HeadStats`: half of its hidden states (at most `exemplars`) are the exemplars, the other half gives the
    distances and `weight`, one number, by the least divergence from the labels.

    Attributes:
        exemplars: hidden states that are kept.
        neighbours: the largest q.
    """

    exemplars: Count = 2048
    neighbours: Count = 16

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(exemplars=128, neighbours=8)]

    def check(self, dim: int, vocab: int) -> None:
        if self.neighbours > self.exemplars:
            raise ValueError(
                f"sdm asked for {self.neighbours} neighbours among {self.exemplars} exemplars; at least 1 neighbour "
                "and no more than exemplars are possible"
            )
        super().check(dim, vocab)

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> SDMHead:
        inner = self.inner.module(dim, vocab, bias=bias)
        return SDMHead(dim, vocab, self.exemplars, self.neighbours, inner)

    @torch.no_grad()
    def fit(
        self, head: SDMHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        if stats is None or len(stats.states) < 2 * self.exemplars:
            held = "none" if stats is None else f"{len(stats.states)}"
            raise ValueError(
                f"{self} needs {2 * self.exemplars} hidden states, half as exemplars and half to calibrate, and got "
                f"{held}; pass stats=sh.collect(model, more data), or ask for fewer exemplars"
            )
        super().fit(head, weight, bias, stats)
        count = self.exemplars
        kept, rest = stats.states[:count], stats.states[count : 2 * count].to(weight.device)
        head.keys.copy_(kept)
        labels = stats.labels[:count].to(weight.device)
        guesses = over_states(
            lambda h: head.inner.scores(h).argmax(-1),
            kept.to(weight.device),
            len(weight),
            "guesses",
        )
        head.labels.copy_(torch.where(guesses == labels, labels, -1))
        head.distances.copy_(head.nearest(rest)[0][:, 0].sort().values)
        truth = stats.labels[count : 2 * count].to(weight.device)

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            size = len(weight)
            for h, y in zip(in_chunks(rest, size), in_chunks(truth, size), strict=True):
                scores = head.inner.scores(h).float()
                scores = scores * (head.logit_scale * head.exponent(h, scores)[0])
                yield scores, scores.gather(-1, y[:, None]).squeeze(-1)

        head.weight.fill_(best_scale(parts))


class SDMHead(WrapperHead):
    """`keys (E, D)`, `labels (E,)` (-1: predicted wrongly), `distances (E,)` of calibration states, rising."""

    def __init__(self, dim: int, vocab: int, exemplars: int, neighbours: int, inner: Head):
        super().__init__(dim, vocab, inner, ("weight", "keys", "distances"))
        self.neighbours = neighbours
        self.weight = nn.Parameter(torch.empty(1))
        self.keys: Tensor
        self.labels: Tensor
        self.distances: Tensor
        self.register_buffer("keys", torch.zeros(exemplars, dim))
        self.register_buffer("labels", torch.zeros(exemplars, dtype=_signed(vocab)))
        self.register_buffer("distances", torch.zeros(exemplars))

    def scores(self, hidden: Tensor) -> Tensor:
        scores = self.inner.scores(hidden).float()
        return scores * (self.exponent(hidden, scores)[0] * self.weight)

    @torch.no_grad()
    def exponent(self, hidden: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`d log(2 + q)`, `(…, 1)`, and q and d themselves, `(…)`."""
        distance, where = self.nearest(hidden.detach())
        same = self.labels[where] == scores.argmax(-1, keepdim=True)
        q = same.long().cumprod(-1).sum(-1)
        known = self.distances.float()
        nearer = torch.searchsorted(known, distance[..., 0].contiguous())
        d = (len(known) - nearer + 1) / (len(known) + 1)  # never 0: the best token stays
        return (d * (2 + q).log()).unsqueeze(-1), q, d

    @torch.no_grad()
    def nearest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Distances to the nearest exemplars and which they are, `(…, neighbours)`, the nearest first."""
        keys, h = self.keys.float(), hidden.float()
        squared = keys.square().sum(-1) - 2 * h @ keys.T + h.square().sum(-1, keepdim=True)
        found, where = squared.topk(self.neighbours, largest=False)
        return found.clamp_min(0).sqrt(), where

    @torch.no_grad()
    def evidence(self, hidden: Tensor) -> Evidence:
        """How far the best token of each hidden state `(…, D)` is to be trusted."""
        scores = self.inner.scores(hidden).float()
        exponent, q, d = self.exponent(hidden, scores)
        p, token = self._known_transform()(scores * exponent * self.weight).softmax(-1).max(-1)
        return Evidence(q, d, p, token)

    @property
    def flops(self) -> int:
        return self.inner.flops + 2 * self.keys.numel()

    def notes(self) -> list[str]:
        right = float((self.labels >= 0).float().mean())
        return [
            f"{len(self.labels):,} exemplars, {right:.1%} predicted rightly; magnitude {self.weight.item():.3g}",
            *super().notes(),
        ]


def _signed(vocab: int) -> torch.dtype:
    dtype = index_dtype(vocab)
    return torch.int16 if dtype == torch.uint8 else dtype
