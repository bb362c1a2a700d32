"""A temperature that depends on the hidden state, on top of any head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.forms.wrapper import WrapperHead, WrapperSpec
from hf_softheads.registry import Bounds, Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class Temperature(WrapperSpec, name="temperature"):
    """`logits = inner(h) / τ(h)`, `τ(h) = low + (high - low) σ(out · tanh(weight h / ‖h‖) + shift)`.

    The idea of TempNet (arXiv 2404.04575) with the hidden state instead of the logits as its input, so that it costs
    `width · D` parameters whatever the vocabulary. Starts at τ = 1 (to 1e-3), so nothing changes until it is
    trained: alone on held-out text it calibrates, with the robust loss of the paper it learns when to be sure.

    Attributes:
        width: hidden units.
        low, high: bounds of the temperature, with 1 between them.
    """

    width: Count = 64
    low: Annotated[float, Bounds(above=0, below=1)] = 0.5
    high: Annotated[float, Bounds(above=1)] = 2.0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(width=8)]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls()

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> TemperatureHead:
        inner = self.inner.module(dim, vocab, bias=bias)
        return TemperatureHead(dim, vocab, self.width, self.low, self.high, inner)

    @torch.no_grad()
    def fit(
        self, head: TemperatureHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        super().fit(head, weight, bias, stats)
        generator = torch.Generator().manual_seed(0)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.out.copy_(
            1e-4 * torch.randn(self.width, generator=generator)
        )  # 0 would stop the gradient
        share = (1 - self.low) / (self.high - self.low)
        head.shift.fill_(math.log(share / (1 - share)))


class TemperatureHead(WrapperHead):
    """`weight (width, D)`, `out (width,)`, `shift (1,)`."""

    def __init__(self, dim: int, vocab: int, width: int, low: float, high: float, inner: Head):
        super().__init__(dim, vocab, inner, ("out", "shift"))
        self.low, self.high = low, high
        self.weight = nn.Parameter(torch.empty(width, dim))
        self.out = nn.Parameter(torch.empty(width))
        self.shift = nn.Parameter(torch.empty(1))

    def temperature(self, hidden: Tensor) -> Tensor:
        """`τ(h)`, `(…, 1)` fp32."""
        units = F.linear(F.normalize(hidden, dim=-1), self.weight).float().tanh()
        share = ((units * self.out).sum(-1, keepdim=True) + self.shift).sigmoid()
        return self.low + (self.high - self.low) * share

    def scores(self, hidden: Tensor) -> Tensor:
        return self.inner.scores(hidden).float() / self.temperature(hidden)
