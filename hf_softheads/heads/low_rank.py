"""A low-rank head: the best rank-r matrix in the metric of the hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.metric import principal_directions
from hf_softheads.heads.rows import RowsHead
from hf_softheads.kmeans import require_finite

if TYPE_CHECKING:
    from hf_softheads.stats import HeadStats


@dataclass(frozen=True)
class LowRank(HeadSpec, name="low_rank"):
    """`logits = weight (down h)`, `weight (V, rank)`, `down (rank, D)`.

    With `HeadStats` the truncated SVD of `λ^{1/2} W Σ^{1/2}`, `Σ = E[h hᵀ]`, `λ_v = E[p_v(1-p_v)]`: least expected
    squared error of the logits (as in DRONE, Chen et al. 2021), rows weighted by what the softmax feels of them.
    Without statistics the plain truncated SVD, which is far worse.
    """

    rank: int

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(max(1, dim * part // 8)) for part in (1, 2, 4, 6)]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls(dim)

    def check(self, dim: int, vocab: int) -> None:
        if not 1 <= self.rank <= min(dim, vocab):
            raise ValueError(
                f"low_rank asked for rank {self.rank} of a ({vocab}, {dim}) matrix; "
                f"1 to {min(dim, vocab)} are possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> LowRankHead:
        return LowRankHead(dim, vocab, self.rank, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: LowRankHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        project, down = principal_directions(weight, stats, self.rank)
        head.weight.copy_(weight.float() @ project)
        head.down.copy_(down)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


class LowRankHead(RowsHead):
    def __init__(self, dim: int, vocab: int, rank: int, *, bias: bool):
        super().__init__(dim, vocab, bias=bias)
        self.weight = nn.Parameter(torch.empty(vocab, rank))
        self.down = nn.Parameter(torch.empty(rank, dim))

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(self.prepare(hidden), self.weight, self.bias)

    def prepare(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.down)

    def rows(self, which: slice | Tensor) -> Tensor:
        return self.weight[which]

    @property
    def flops(self) -> int:
        return 2 * (self.weight.numel() + self.down.numel())
