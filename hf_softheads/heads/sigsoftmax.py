"""Sigsoftmax: a softmax whose logits are bent, against the softmax bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.forms.wrapper import WrapperHead, WrapperSpec
from hf_softheads.registry import Bounds

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class Sigsoftmax(WrapperSpec, name="sigsoftmax"):
    """`p ∝ exp(z) σ(z)^α`, that is logits `z + α log σ(z)` of an inner head's `z`; α = 1 is published (1805.10829).

    The log-probabilities of many contexts are no longer confined to a space of D + 1 dimensions. The order of the
    tokens does not change. A retrofit starts from the inner head's fit and wants fine-tuning; from α = 0 it starts
    as the plain softmax and learns α, the parameter `weight`.
    """

    alpha: Annotated[float, Bounds(at_least=0, at_most=10)] = 1.0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls()]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls(alpha=0.0)

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> SigsoftmaxHead:
        return SigsoftmaxHead(dim, vocab, self.inner.module(dim, vocab, bias=bias))

    @torch.no_grad()
    def fit(
        self, head: SigsoftmaxHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        super().fit(head, weight, bias, stats)
        head.weight.fill_(self.alpha)


class SigsoftmaxHead(WrapperHead):
    """`weight (1,)` is α."""

    def __init__(self, dim: int, vocab: int, inner: Head):
        super().__init__(dim, vocab, inner, ("weight",))
        self.weight = nn.Parameter(torch.empty(1))

    def scores(self, hidden: Tensor) -> Tensor:
        scores = self.inner.scores(hidden).float()
        return scores + self.weight * F.logsigmoid(scores)
