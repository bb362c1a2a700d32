"""A multi-class support vector machine in place of the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import in_chunks, minimize_scalar_convex
from hf_softheads.heads.forms.wrapper import WrapperHead, WrapperSpec
from hf_softheads.registry import Positive

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_STATES = 512  # hidden states that the scale is fitted to


@dataclass(frozen=True)
class SVM(WrapperSpec, name="svm"):
    """`score_v = weight · inner_v(h)`: margins for `losses.MultiMargin`, in units in which the margin is 1.

    Source: Crammer & Singer 2001; as the last layer of a network arXiv 1306.0239. The rows are those of the inner head;
    `weight`, one number, starts where the hinge loss `Σ_{v ≠ y} max(0, 1 - score_y + score_v)` of the sampled hidden
    states is least. The order of the tokens does not change. Margins are no density: `log_prob` is the softmax of
    the margins, which nothing calibrates; wrap it in `Temperature` and train that for probabilities.

    Attributes:
        scale: a fixed start of `weight` instead of the fitted one, which needs `HeadStats`; 1 is the inner head.
    """

    scale: Positive | None = None

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(scale=1.0)]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls(scale=1.0)

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> SVMHead:
        return SVMHead(dim, vocab, self.inner.module(dim, vocab, bias=bias))

    @torch.no_grad()
    def fit(
        self, head: SVMHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        super().fit(head, weight, bias, stats)
        head.weight.fill_(1.0 if self.scale is None else self.scale)
        head.fitted.zero_()
        if self.scale is not None or stats is None:
            return
        states = stats.states[:_STATES].to(weight.device)
        labels = stats.labels[:_STATES].to(weight.device)
        gain, vocab = head.logit_scale, len(weight)

        def slope(scales: Tensor) -> Tensor:
            total = torch.zeros(len(scales), dtype=torch.float64)
            for h, y in zip(in_chunks(states, vocab), in_chunks(labels, vocab), strict=True):
                scores = head.inner.scores(h).float() * gain
                excess = scores - scores.gather(-1, y[:, None])
                for i, scale in enumerate(scales.tolist()):
                    total[i] += float((excess * (1 + scale * excess > 0)).sum())
            return total

        head.weight.fill_(minimize_scalar_convex(slope, 1e-3, 1e3))
        head.fitted.fill_(len(states))


class SVMHead(WrapperHead):
    """`weight (1,)` scales the inner head's scores."""

    def __init__(self, dim: int, vocab: int, inner: Head):
        super().__init__(dim, vocab, inner, ("weight",))
        self.weight = nn.Parameter(torch.empty(1))
        self.fitted: Tensor
        self.register_buffer("fitted", torch.zeros(1, dtype=torch.int32))

    def scores(self, hidden: Tensor) -> Tensor:
        return self.inner.scores(hidden).float() * self.weight

    def score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.inner.score(hidden, tokens) * self.weight

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.inner.subset(hidden, tokens) * self.weight

    def notes(self) -> list[str]:
        how = f"fitted to {int(self.fitted)} hidden states" if int(self.fitted) else "not fitted"
        return [
            f"scores are margins, not log-probabilities; scale {self.weight.item():.3g}, {how}",
            *super().notes(),
        ]
