"""Mixture of softmaxes: several distributions from one matrix, against the softmax bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.forms.wrapper import WrapperHead, WrapperSpec
from hf_softheads.registry import Count, CountOrZero, NotNegative

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class Mixture(WrapperSpec, name="mixture"):
    """`p = Σ_k π_k softmax(inner(h_k))`, `h_k = h + tanh(weight_k h)`, `π = softmax(gate h)` (arXiv 1711.03953).

    Logits are `log p`. The paper's `h_k = tanh(W_k h)` is trained from scratch; a retrofit keeps the trained hidden
    state and adds to it, so that with `weight = 0` it is the inner head (the fit adds a little noise, lest all
    components stay the same). Costs `components` times the inner head.

    Attributes:
        components: K.
        noise: deviation of the entries of `weight` after the fit, times `D**-0.5`.
        seed: of the noise.
    """

    components: Count = 4
    noise: NotNegative = 0.01
    seed: CountOrZero = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(components=2)]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec | None:
        return None  # the logits of a mixture are log-probabilities: the distribution is the same, the shift is not

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> MixtureHead:
        inner = self.inner.module(dim, vocab, bias=bias)
        return MixtureHead(dim, vocab, self.components, inner)

    @torch.no_grad()
    def fit(
        self, head: MixtureHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        super().fit(head, weight, bias, stats)
        generator = torch.Generator().manual_seed(self.seed)
        dim = head.in_features
        head.weight.copy_(
            torch.randn(head.weight.shape, generator=generator) * self.noise / dim**0.5
        )
        head.gate.zero_()


class MixtureHead(WrapperHead):
    """`weight (K, D, D)`, `gate (K, D)`."""

    def __init__(self, dim: int, vocab: int, components: int, inner: Head):
        super().__init__(dim, vocab, inner)
        self.weight = nn.Parameter(torch.empty(components, dim, dim))
        self.gate = nn.Parameter(torch.empty(components, dim))

    def scores(self, hidden: Tensor) -> Tensor:
        shares = F.linear(hidden, self.gate).float().log_softmax(-1)
        total: Tensor | None = None
        for matrix, share in zip(self.weight, shares.unbind(-1), strict=True):
            shifted = hidden + F.linear(hidden, matrix).tanh()
            part = self.inner.scores(shifted).float().log_softmax(-1) + share.unsqueeze(-1)
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total

    @property
    def flops(self) -> int:
        return len(self.weight) * (self.inner.flops + 2 * self.in_features**2)
