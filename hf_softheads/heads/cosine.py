"""Cosine softmax: rows on the unit sphere and a learned scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import best_scale, in_chunks, scores_of
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.heads.forms.token_rows import RowKind

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_STATES = 512  # hidden states that the scale is fitted to


@dataclass(frozen=True)
class Cosine(HeadSpec, name="cosine"):
    """`logit_v = scale · length_v · cos(h, weight_v)`; without lengths the hyperspherical softmax.

    Source: Wang et al. 2017, arXiv 1704.06369. Rows and hidden states count by their direction alone, so that no token
    is likely for its length; the trained lengths carry much of a language model's token frequencies, and
    dropping them wants training. `scale` starts where the divergence from the dense head is least on the sampled
    hidden states; without `HeadStats` at `√D`, the length of a normalised state, times the mean row length.

    Attributes:
        lengths: which are kept: `none`, `rows` (a trainable length per token), or `both`, that of the hidden state
            too, which is the dense head in other parameters.
    """

    lengths: Literal["none", "rows", "both"] = "rows"

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls("none"), cls("rows")]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls("both")

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> CosineHead:
        return CosineHead(dim, vocab, self.lengths, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: CosineHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        head.weight.copy_(weight)
        lengths = head.weight.float().norm(dim=-1)
        if head.length is not None:
            head.length.copy_(lengths)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)
        head.scale.fill_(1.0)
        head.states.zero_()
        if self.lengths == "both":
            return
        if stats is None:
            typical = 1.0 if head.length is not None else float(lengths.mean())
            head.scale.fill_(head.in_features**0.5 * typical)
            return
        states = stats.states[:_STATES].to(weight.device)
        gain = head.logit_scale

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            for h in in_chunks(states, len(weight)):
                wanted = scores_of(h, weight, bias).mul_(gain).softmax(-1)
                scores = gain * head.directions(h)
                yield scores, (wanted * scores).sum(-1)

        head.scale.fill_(best_scale(parts))
        head.states.fill_(len(states))


class CosineHead(Head):
    """`weight (V, D)` is normalised when used; `length (V,)` where rows keep theirs; `scale (1,)`."""

    keep_in_fp32 = ("scale",)
    row_kind: RowKind = "trained"

    def __init__(self, dim: int, vocab: int, lengths: str, *, bias: bool):
        super().__init__(dim, vocab)
        self.lengths = lengths
        self.weight = nn.Parameter(torch.empty(vocab, dim))
        self.length = None if lengths == "none" else nn.Parameter(torch.empty(vocab))
        self.scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None
        self.states: Tensor
        self.register_buffer("states", torch.zeros(1, dtype=torch.int32))  # scale fitted to so many

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).float()

    def scores(self, hidden: Tensor) -> Tensor:
        scores = self.scale * self.directions(hidden)
        return scores if self.bias is None else scores + self.bias

    def directions(self, hidden: Tensor) -> Tensor:
        """The scores without scale and bias, `(…, V)` fp32."""
        if self.lengths != "both":
            hidden = F.normalize(hidden, dim=-1)
        found: Tensor = F.linear(hidden, self.weight).float() * self._factor()
        return found

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        if self.lengths != "both":
            hidden = F.normalize(hidden, dim=-1)
        scores: Tensor = F.linear(hidden, self.weight[tokens]).float() * self._factor()[tokens]
        scores = self.scale * scores
        return scores if self.bias is None else scores + self.bias[tokens]

    def _factor(self) -> Tensor:
        """What turns a product with a row into that with its direction, times the length that it keeps, `(V,)`."""

        def build() -> Tensor:
            norm = self.weight.float().norm(dim=-1).clamp_min(1e-12)
            length = torch.ones_like(norm) if self.length is None else self.length.float()
            return torch.div(length, norm)

        if torch.is_grad_enabled() and self.weight.requires_grad:
            return build()
        sources = (self.weight,) if self.length is None else (self.weight, self.length)
        return self._derived("factor", build, *sources)

    def notes(self) -> list[str]:
        if self.lengths == "both" or int(self.states):
            return [f"scale {self.scale.item():.2f}"]
        return [
            f"scale {self.scale.item():.2f} is a guess, there were no statistics (patch with stats=…)"
        ]
