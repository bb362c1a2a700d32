"""A low-rank part for what all rows share, few-bit codes for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.blockwise import blocks
from hf_softheads.heads.fit.hessian import local_moments, principal_directions
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.heads.quantized import Quantized, QuantizedHead, quantize_rows
from hf_softheads.registry import Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_ROUNDS = 3


@dataclass(frozen=True)
class LowRankResidual(HeadSpec, name="low_rank_residual"):
    """`row_v = up_v down + s_vg (q_v - (2**bits - 1) / 2)`: `low_rank` plus `quantized`, fitted in turns.

    Each turn takes the best low-rank matrix for what the codes miss and the best codes for what that misses, both
    in the metric of the hidden states (the structure of ARCHead, arXiv 2608.02703, and LQ-LoRA, arXiv 2311.12023).

    Attributes:
        rank: of the low-rank part; 16 · rank / D bits per weight.
        bits, group: of the codes, as in `quantized`.
    """

    rank: Count = 8
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group: Count | None = None

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(max(1, dim // 16), bits) for bits in (2, 3, 4, 5)]

    def check(self, dim: int, vocab: int) -> None:
        if self.rank > min(dim, vocab):
            raise ValueError(
                f"low_rank_residual asked for rank {self.rank}; 1 to {min(dim, vocab)} are possible"
            )
        Quantized(self.bits, self.group).check(dim, vocab)

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> LowRankResidualHead:
        return LowRankResidualHead(dim, vocab, self.rank, self.bits, self.group or dim, bias=bias)

    @torch.no_grad()
    def fit(
        self,
        head: LowRankResidualHead,
        weight: Tensor,
        bias: Tensor | None,
        stats: HeadStats | None,
    ) -> None:
        require_finite(weight, "output rows")
        metrics = None if stats is None else local_moments(stats, weight)
        codes = None
        for _ in range(_ROUNDS):
            project, down = principal_directions(weight, stats, self.rank, codes)
            for which in blocks(len(weight)):
                missed = weight[which].float()
                missed = missed if codes is None else missed - codes(which)
                head.up[which] = (missed @ project).bfloat16()
            head.down.copy_(down.bfloat16())
            found = quantize_rows(
                weight, self.bits, head.group, metrics, lambda which: head.up[which] @ head.down
            )
            head.store(*found)
            codes = head.codes_only
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


class LowRankResidualHead(QuantizedHead):
    """`weight` holds the scales; it, `up (V, rank)` and `down (rank, D)` train."""

    def __init__(self, dim: int, vocab: int, rank: int, bits: int, group: int, *, bias: bool):
        super().__init__(dim, vocab, bits, group, bias=bias)
        self.up = nn.Parameter(torch.empty(vocab, rank))
        self.down = nn.Parameter(torch.empty(rank, dim))

    def codes_only(self, which: slice | Tensor) -> Tensor:
        return super().rows(which)

    def prepare(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, F.linear(hidden, self.down)], -1)

    def compiled(self, hidden: Tensor) -> Tensor:
        shared = F.linear(F.linear(hidden, self.down), self.up)
        return super().compiled(hidden).add_(shared)

    def unpacked_product(self, x: Tensor, start: int, stop: int) -> Tensor:
        states, shared = x.split([self.in_features, len(self.down)], -1)
        codes = super().unpacked_product(states, start, stop)
        return codes + F.linear(shared, self.up[start:stop].to(x.dtype))

    def rows(self, which: slice | Tensor) -> Tensor:
        return torch.cat([super().rows(which), self.up[which]], -1)
