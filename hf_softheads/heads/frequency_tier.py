"""Exact rows for the most frequent tokens, one row and a prior for all others: the least a screen must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.blockwise import linear_log_odds, over_states, scores_of
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.heads.fit.perplexity_floor import measure_floor
from hf_softheads.heads.forms.vq_module import VQHead
from hf_softheads.registry import Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_STATES = 4096  # hidden states that the tail is fitted to


@dataclass(frozen=True)
class FrequencyTier(HeadSpec, name="frequency_tier"):
    """`z_v = w_v · h` for the `tokens` most frequent tokens, `z_v = tail · h + log π_v + c` for all others.

    Rows of the tier are the trained ones. The others share one row and c, by logistic regression of the probability
    that they have together; `π` is their mean probability under the dense model, the best that does not depend on h.
    Nothing is impossible, but a token outside the tier is hardly ever the greedy one: `coverage` says how much text
    and how many greedy tokens the tier holds, on hidden states whose tokens were left out of the counts; text of
    another kind holds fewer.

    This is `vq` with a code for each frequent token and one for the rest, and shares its fast paths. Needs
    `HeadStats`. As the screen of `screened` its rows are stored twice, and tokens outside are seldom candidates.

    Attributes:
        tokens: how many have a row of their own.
    """

    tokens: Count

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(max(1, vocab * part // 8)) for part in (1, 2, 5, 6)]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls(vocab)

    def check(self, dim: int, vocab: int) -> None:
        if self.tokens > vocab:
            raise ValueError(
                f"frequency_tier asked for {self.tokens} tokens; 1 to {vocab} are possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> FrequencyTierHead:
        return FrequencyTierHead(dim, vocab, self.tokens + 1, bias=True, singletons=self.tokens)

    @torch.no_grad()
    def fit(
        self, head: FrequencyTierHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        if stats is None:
            raise ValueError(
                f"{self} needs the token frequencies; pass stats=sh.collect(model, batches)"
            )
        require_finite(weight, "output rows")
        assert head.bias is not None
        order = stats.frequency.argsort(descending=True, stable=True).to(weight.device)
        tier, rest = order[: self.tokens], order[self.tokens :]
        head.codes.fill_(self.tokens)
        head.codes[tier] = torch.arange(self.tokens, device=weight.device).to(head.codes.dtype)
        head.weight.zero_()
        head.weight[:-1] = weight[tier]
        head.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
        if len(rest):
            row, prior = _tail(head, weight, bias, rest, stats)
            head.weight[-1], head.bias[rest] = row, prior
        measure_floor(head, stats)
        head.measure(weight, bias, stats)


def _tail(
    head: FrequencyTierHead, weight: Tensor, bias: Tensor | None, rest: Tensor, stats: HeadStats
) -> tuple[Tensor, Tensor]:
    """The common row of the tokens `rest` and the bias of each."""
    transform = head.transform or (lambda z: z)
    states = stats.states[:_STATES].to(weight.device)
    inside = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    inside[rest] = False

    def masses(h: Tensor) -> Tensor:
        z = transform(scores_of(h, weight, bias))
        return torch.stack([z[:, inside].logsumexp(-1), z[:, rest].logsumexp(-1)], 1)

    known, mass = over_states(masses, states, len(weight), "tail").unbind(1)
    row, shift = linear_log_odds(states, known, mass)
    prior = stats.mean_prob.to(weight.device)[rest].double().log()
    prior = (prior - prior.logsumexp(0)).float()
    return row / head.gain, (prior + shift) / head.gain


class FrequencyTierHead(VQHead):
    """A `VQHead`: the tier's rows by falling frequency, then the row of all others, whose code is the last."""

    def __init__(self, dim: int, vocab: int, codes: int, *, bias: bool, singletons: int = 0):
        super().__init__(dim, vocab, codes, bias=bias, singletons=singletons)
        self.millionths: Tensor
        self.register_buffer("millionths", torch.full((2,), -1, dtype=torch.int32))

    @property
    def coverage(self) -> tuple[float, float] | None:
        """Share of the next tokens, and of the dense head's greedy tokens, that a tier chosen on other text holds."""
        text, greedy = self.millionths.tolist()
        return None if text < 0 else (text / 1e6, greedy / 1e6)

    @torch.no_grad()
    def measure(self, weight: Tensor, bias: Tensor | None, stats: HeadStats) -> None:
        """Set `coverage` on a quarter of the states, whose tokens are taken out of the counts."""
        held = max(1, len(stats.labels) // 4)
        labels, states = stats.labels[-held:], stats.states[-held:].to(weight.device)
        counts = stats.token_counts - torch.bincount(labels, minlength=stats.vocab)
        seen = (counts.double() + stats.mean_prob.double()).argsort(descending=True, stable=True)
        inside = torch.zeros(stats.vocab, dtype=torch.bool)
        inside[seen[: self.singletons]] = True
        greedy = over_states(
            lambda h: scores_of(h, weight, bias).argmax(-1), states, stats.vocab, "coverage"
        ).cpu()
        shares = torch.stack([inside[labels], inside[greedy]]).double().mean(1)
        self.millionths.copy_((1e6 * shares).round())

    def notes(self) -> list[str]:
        lines = [f"rows for {self.singletons:,} of {self.out_features:,} tokens"]
        if self.coverage is not None:
            text, greedy = self.coverage
            lines[0] += (
                f": {text:.1%} of text left out of the counts, {greedy:.1%} of greedy tokens"
            )
        return lines
