"""A head over the frequent part of the vocabulary, for the draft model of assisted generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.forms.largest import by_two_passes
from hf_softheads.heads.forms.sampling import check_temperature, gumbel_max
from hf_softheads.heads.forms.token_numbers import of_logits
from hf_softheads.registry import Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class Draft(HeadSpec, name="draft"):
    """`logit_v = weight_v · h` for the `tokens` most frequent tokens, -inf for all others.

    Source: FR-Spec, arXiv 2502.14856. For `generate(assistant_model=…)`: the target model verifies every proposal, so
    nothing is lost but proposals; a token outside costs a rejected one. Token ids stay those of the whole
    vocabulary. As a model of its own it is worthless: strict perplexity is infinite as soon as the text holds one token
    outside, and a length-L text survives with `coverage ** L`.

    Rows are the trained ones. Which tokens are frequent comes from `HeadStats` (best of text that the target model
    wrote), `coverage` is their share of that text's tokens. A soft cap after the head (Gemma) turns -inf into
    `-cap`, which is as unlikely.

    Attributes:
        tokens: how many rows are kept.
    """

    tokens: Count

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(vocab)]  # fewer: infinitely far from the dense head

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls(vocab)

    def check(self, dim: int, vocab: int) -> None:
        if self.tokens > vocab:
            raise ValueError(f"draft asked for {self.tokens} tokens; 1 to {vocab} are possible")

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> DraftHead:
        return DraftHead(dim, vocab, self.tokens, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: DraftHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        if stats is None:
            raise ValueError(
                f"{self} needs the token frequencies; pass stats=sh.collect(model, batches), best of text that the "
                "target model wrote"
            )
        counts = stats.token_counts.double()
        ids = stats.frequency.argsort(descending=True, stable=True)[: self.tokens].sort().values
        head.ids.copy_(ids)
        head.weight.copy_(weight[ids.to(weight.device)])
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias[ids.to(bias.device)])
        head.millionths.fill_(round(1e6 * float(counts[ids].sum() / counts.sum().clamp_min(1))))


class DraftHead(Head):
    """`weight (n, D)` and `ids (n,)`, the token of each row, rising."""

    def __init__(self, dim: int, vocab: int, tokens: int, *, bias: bool):
        super().__init__(dim, vocab)
        self.weight = nn.Parameter(torch.empty(tokens, dim))
        self.bias = nn.Parameter(torch.empty(tokens)) if bias else None
        self.ids: Tensor
        self.millionths: Tensor
        self.register_buffer("ids", torch.arange(tokens).to(index_dtype(vocab)))
        self.register_buffer("millionths", torch.zeros(1, dtype=torch.int32))

    def index_limits(self) -> dict[str, int]:
        return {"ids": self.out_features}

    @property
    def coverage(self) -> float:
        """Share of the statistics' tokens that have a row."""
        return int(self.millionths) / 1e6

    def token_maps(self) -> dict[str, Tensor]:
        """`d2t (n,)` int64 and `t2d (V,)` bool, as checkpoints of EAGLE-3 draft models hold them beside `weight`.

        Row i is token `i + d2t[i]`; `t2d` says which tokens have a row.
        """
        ids = self.ids.long()
        has_row = torch.zeros(self.out_features, dtype=torch.bool, device=ids.device)
        return {
            "d2t": ids - torch.arange(len(ids), device=ids.device),
            "t2d": has_row.index_fill(0, ids, True),
        }

    def kept(self, hidden: Tensor) -> Tensor:
        """Scores of the tokens `ids`, `(…, n)`."""
        return F.linear(hidden, self.weight, self.bias)

    def scores(self, hidden: Tensor) -> Tensor:
        return self._spread(self.kept(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        return self._spread(self._kept_logits(hidden))

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        def chunk(h: Tensor, y: Tensor) -> Tensor:
            place = self._places()[y]
            z = self._kept_logits(h)
            found = z.gather(-1, place.clamp_min(0).unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)
            return found.masked_fill(place < 0, -torch.inf)

        return self._in_chunks(chunk, hidden, labels, width=len(self.weight))

    def logsumexp(self, hidden: Tensor) -> Tensor:
        return self._in_chunks(
            lambda h: self._kept_logits(h).logsumexp(-1), hidden, width=len(self.weight)
        )

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        def chunk(h: Tensor, y: Tensor) -> Tensor:
            place = self._places()[y]
            z = self._kept_logits(h) / temperature
            log_prob, entropy, best, *rest = of_logits(z, place.clamp_min(0), moments).unbind(-1)
            log_prob = log_prob.masked_fill(place < 0, -torch.inf)
            best = self.ids.long()[best.detach().long()].to(z.dtype)
            if rest and len(self.weight) < self.out_features:
                rest[0] = torch.full_like(rest[0], -torch.inf)  # the mean over all tokens
            return torch.stack([log_prob, entropy, best, *rest], -1)

        return self._in_chunks(chunk, hidden, labels, width=len(self.weight))

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if k > len(self.weight):
            return super().topk(hidden, k)
        values, places = self._kept_logits(hidden).topk(k, -1)
        return values, self.ids.long()[places]

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        return by_two_passes(self, hidden, k, temperature)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        check_temperature(temperature)

        def chunk(h: Tensor) -> Tensor:
            return self.ids.long()[gumbel_max(self._kept_logits(h) / temperature, generator)]

        return self._in_chunks(chunk, hidden, width=len(self.weight))

    def _places(self) -> Tensor:
        """Row of each token, `(V,)`; -1 for one without."""

        def build() -> Tensor:
            ids = self.ids.long()
            places = torch.full((self.out_features,), -1, device=ids.device)
            return places.index_copy(0, ids, torch.arange(len(ids), device=ids.device))

        return self._derived("places", build, self.ids)

    def _kept_logits(self, hidden: Tensor) -> Tensor:
        return self._known_transform()(self.kept(hidden).float())

    def _spread(self, kept: Tensor) -> Tensor:
        full = kept.new_full((*kept.shape[:-1], self.out_features), -torch.inf)
        return full.index_copy(-1, self.ids.long(), kept)

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel()

    def notes(self) -> list[str]:
        return [
            f"a row for {len(self.weight):,} of {self.out_features:,} tokens, {self.coverage:.2%} of the text that the "
            "statistics saw; all others are impossible: only for a draft model"
        ]
