"""A screened head that scores a hidden state by all exact rows where its candidates lead by too little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.blockwise import over_states
from hf_softheads.heads.forms.largest import largest, logsumexp, packed
from hf_softheads.heads.low_rank import LowRank
from hf_softheads.heads.screened import STATES, Screened, ScreenedHead
from hf_softheads.registry import NotNegative

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class Cascade(Screened, name="cascade"):
    """`screened` where `log Σ_candidates exp z - log Σ_rest exp z ≥ margin`, else `z_v = inner_v(h)` for all tokens.

    The rest is weighed by its previews plus `weight`, in nats of the model's distribution: at a margin of m it may hold
    `1 / (1 + exp m)` of the probability, 27 % at 1, 5 % at 3. That finds wrong greedy tokens and divergence better than
    the lead over the best preview of the rest, which is large wherever there are many candidates. Only the states that
    lead by less read all rows, whatever the batch; their own best rows are summed in fp32 too. Inside `torch.compile`,
    where shapes may not depend on data, all rows are read for every state, with the same result.

    With `HeadStats`, `fallback` is the share of their hidden states that leads by less, a part of `bytes_read`, and
    `weight` is calibrated on the others.

    Attributes:
        margin: nats, at least 0; more is more exact and reads more.
    """

    margin: NotNegative = 1.0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [
            cls(LowRank(max(1, dim // part)), max(1, vocab // 8), margin=0.0) for part in (8, 4, 2)
        ]

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> CascadeHead:
        screen = self.screen.module(dim, vocab, bias=bias)
        inner = self.inner.module(dim, vocab, bias=bias)
        return CascadeHead(dim, vocab, self.candidates, screen, inner, self.margin)

    @torch.no_grad()
    def fit(
        self, head: ScreenedHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        super().fit(head, weight, bias, stats)
        if stats is None or not isinstance(head, CascadeHead):
            return

        def unsure(states: Tensor) -> Tensor:
            return over_states(lambda h: head._preview(h, 0).unsure, states, head._width, "leads")

        states = stats.states[:STATES].to(weight.device)
        sure = ~unsure(states)
        if bool(sure.any()):
            head.calibrate(states[sure], weight, bias)
        fresh = stats.states[STATES:] if len(stats.states) > STATES else stats.states
        share = unsure(fresh[:STATES].to(weight.device)).float().mean()
        head.millionths.fill_(round(1e6 * float(share)))


class _Preview(NamedTuple):
    """What is known of some hidden states before any of them is scored by all rows."""

    previews: Tensor  # shifted by `weight`, (N, V)
    values: Tensor  # exact scores of the candidates, then some more of the best previews, (N, candidates + more)
    tokens: Tensor  # whose they are
    unsure: Tensor  # (N,) bool


class CascadeHead(ScreenedHead):
    """A `ScreenedHead`; `millionths (1,)` is the share of hidden states that fall back, -1 if not known."""

    def __init__(self, dim, vocab, candidates, screen, inner, margin):  # type: ignore[no-untyped-def]
        super().__init__(dim, vocab, candidates, screen, inner)
        self.margin = margin
        self.millionths: Tensor
        self.register_buffer("millionths", torch.full((1,), -1, dtype=torch.int32))

    @property
    def fallback(self) -> float | None:
        """Share of the statistics' hidden states that are scored by all rows."""
        return None if int(self.millionths) < 0 else int(self.millionths) / 1e6

    @torch.no_grad()
    def unsure(self, hidden: Tensor) -> Tensor:
        """Which hidden states `(…, D)` are scored by all rows, `(…)` bool."""
        return self._in_chunks(lambda h: self._preview(h, 0).unsure, hidden, width=self._width)

    def _preview(self, hidden: Tensor, more: int) -> _Preview:
        transform = self.transform or (lambda z: z)
        previews = self.screen.scores(hidden).float() + self.weight
        count = min(self.candidates + more, self.out_features)
        best, tokens = largest(previews.detach(), count, self.kernels)
        first = tokens[..., : self.candidates]
        exact = self.inner.score(hidden, first)
        rest = transform(previews.detach()).scatter(-1, first, -torch.inf)
        mass, left = transform(exact.detach()).logsumexp(-1), logsumexp(rest, self.kernels)
        values = torch.cat([exact, best[..., self.candidates :]], -1)
        return _Preview(previews, values, tokens, mass - left < self.margin)

    def _mixed(self, hidden: Tensor) -> Tensor:
        found = self._preview(hidden, 0)
        mixed = found.previews.scatter(-1, found.tokens, found.values)
        return self._settle(hidden, found.unsure, mixed, self._whole)

    def _settle(
        self, hidden: Tensor, unsure: Tensor, found: Tensor, whole: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """`found (N, …)` with `whole(hidden)` in the rows that are `unsure (N,)`."""
        if torch.compiler.is_compiling():
            return torch.where(unsure.unsqueeze(-1), whole(hidden), found)
        rows = unsure.nonzero().squeeze(-1)
        return found if not len(rows) else found.index_copy(0, rows, whole(hidden[rows]))

    def _whole(self, hidden: Tensor) -> Tensor:
        """Scores by all exact rows, the best once more with sums in fp32."""
        scores = self.inner.scores(hidden).float()
        tokens = largest(scores.detach(), self.candidates, self.kernels)[1]
        return scores.scatter(-1, tokens, self.inner.score(hidden, tokens))

    def _best(self, hidden: Tensor, k: int, temperature: float | None) -> Tensor:
        transform = self._known_transform()

        def row(values: Tensor, tokens: Tensor, *parts: Tensor) -> Tensor:
            if temperature is None:
                return packed(values, tokens)
            sums = [logsumexp(part / temperature, self.kernels) for part in parts]
            return packed(values, tokens, torch.stack(sums).logsumexp(0))

        def whole(h: Tensor) -> Tensor:
            logits = transform(self._whole(h))
            return row(*largest(logits, k, self.kernels), logits)

        found = self._preview(hidden, k)
        exact = transform(found.values[..., : self.candidates])
        tail = transform(found.previews).scatter(
            -1, found.tokens[..., : self.candidates], -torch.inf
        )
        most, place = transform(found.values).topk(k, -1)
        mixed = row(most, found.tokens.gather(-1, place), exact, tail)
        return self._settle(hidden, found.unsure, mixed, whole)

    @property
    def bytes_read(self) -> int:
        share = 1.0 if self.fallback is None else self.fallback
        spared = self.inner.nbytes * (1 - self.candidates / self.out_features)
        return super().bytes_read + int(share * spared)

    def notes(self) -> list[str]:
        if self.fallback is None:
            found = "how many fall back is not known without statistics, so all are counted"
        else:
            found = f"{self.fallback:.2%} of the states in the statistics fall back to all rows"
        return [f"{found} (lead under {self.margin:g} nats)", *super().notes()]
