"""A low-rank head: the best rank-r matrix in the metric of the hidden states."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.dense import Dense
from hf_softheads.heads.fit.blockwise import blocks
from hf_softheads.heads.fit.hessian import principal_directions
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.heads.forms.streamed_rows import RowsHead, rate_by_size
from hf_softheads.heads.forms.token_rows import RowKind, token_rows
from hf_softheads.heads.forms.trainable_codes import TrainableCodes
from hf_softheads.heads.forms.wrapper import WrapperHead
from hf_softheads.registry import Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class LowRank(HeadSpec, name="low_rank"):
    """`logits = weight (down h)`, `weight (V, rank)`, `down (rank, D)`.

    With `HeadStats` the truncated SVD of `λ^{1/2} W Σ^{1/2}`, `Σ = E[h hᵀ]`, `λ_v = E[p_v(1-p_v)]`: least expected
    squared error of the logits (as in DRONE, Chen et al. 2021), rows weighted by what the softmax feels of them.
    Without statistics the plain truncated SVD, which is far worse.

    Attributes:
        rank: 1 to D.
        inner: what stores the rows `(V, rank)`, any head: `LowRank(D // 4, Quantized(8))` is a fast screen.
    """

    rank: Count
    inner: HeadSpec = field(default_factory=Dense)

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(max(1, dim * part // 8)) for part in (1, 2, 4, 6)]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls(dim)

    def check(self, dim: int, vocab: int) -> None:
        if self.rank > min(dim, vocab):
            raise ValueError(
                f"low_rank asked for rank {self.rank} of a ({vocab}, {dim}) matrix; "
                f"1 to {min(dim, vocab)} are possible"
            )
        self.inner.check(self.rank, vocab)

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> LowRankHead | ProjectedHead:
        if isinstance(self.inner, Dense):
            return LowRankHead(dim, vocab, self.rank, bias=bias)
        return ProjectedHead(dim, vocab, self.inner.module(self.rank, vocab, bias=bias))

    @torch.no_grad()
    def fit(
        self,
        head: LowRankHead | ProjectedHead,
        weight: Tensor,
        bias: Tensor | None,
        stats: HeadStats | None,
    ) -> None:
        require_finite(weight, "output rows")
        project, down = principal_directions(weight, stats, self.rank)
        plain = isinstance(head, LowRankHead)
        rows = head.weight if plain else torch.empty(len(weight), self.rank, device=weight.device)
        if not plain:
            # any rotation does; a random one spreads the rows over the columns, which saves bits
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(self.rank, self.rank, generator=generator)
            rotation = torch.linalg.qr(noise)[0].to(down.device)
            project, down = project @ rotation.T, rotation @ down
        for which in blocks(len(weight)):
            rows[which] = weight[which].float() @ project
        if isinstance(head, ProjectedHead):
            head.weight.copy_(down)
            seen = None if stats is None else projected(stats, head.weight.float())
            self.inner.fit(head.inner_alike(), rows, bias, seen)
            return
        head.down.copy_(down)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


def projected(stats: HeadStats, down: Tensor) -> HeadStats:
    """The statistics of `down h`."""
    down = down.to(stats.states.device)
    wide = down.double()
    return dataclasses.replace(
        stats,
        second_moment=wide @ stats.second_moment @ wide.T,
        mean=wide @ stats.mean,
        prob_weighted_mean=stats.prob_weighted_mean.float() @ down.T,
        states=stats.states @ down.T,
    )


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


class ProjectedHead(WrapperHead):
    """`inner(weight h)`, `weight (rank, D)`; `inner` is a head of states of size rank."""

    def __init__(self, dim: int, vocab: int, inner: Head):
        super().__init__(dim, vocab, inner)
        self.weight = nn.Parameter(torch.empty(inner.in_features, dim))

    def inner_alike(self) -> Head:
        """The inner head, which describes the same model: it gets the transform."""
        self.inner.transform = self.transform
        return self.inner

    @property
    def row_kind(self) -> RowKind:
        rows = token_rows(self.inner)
        if rows is None:
            return "none"
        return "shared" if rows.row_kind == "shared" else "rebuilt"

    def embed(self, tokens: Tensor) -> Tensor:
        rows = token_rows(self.inner)
        assert rows is not None
        found: Tensor = rows.embed(tokens) @ self.weight.float()
        return found

    def prepare(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.inner.scores(self.prepare(hidden))

    def score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.inner.score(self.prepare(hidden), tokens)

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.inner.subset(self.prepare(hidden), tokens)

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.inner_alike().log_prob(self.prepare(hidden), labels)

    def logsumexp(self, hidden: Tensor) -> Tensor:
        return self.inner_alike().logsumexp(self.prepare(hidden))

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        inner = self.inner_alike()
        return inner.token_numbers(self.prepare(hidden), labels, temperature, moments)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self.inner_alike().topk(self.prepare(hidden), k)

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner_alike().topk_logsumexp(self.prepare(hidden), k, temperature)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        inner = self.inner_alike()
        return inner.sample(self.prepare(hidden), temperature=temperature, generator=generator)

    def repair_lr(self, parameter: Tensor) -> float:
        inner = self._trained()
        own = parameter is self.weight or inner is None
        return rate_by_size(parameter) if own or inner is None else inner.repair_lr(parameter)

    @property
    def code_lr(self) -> float:
        inner = self._trained()
        return 0.0 if inner is None else inner.code_lr

    def relax_codes(self) -> list[Tensor]:
        inner = self._trained()
        return [] if inner is None else inner.relax_codes()

    def round_codes(self) -> None:
        inner = self._trained()
        if inner is not None:
            inner.round_codes()

    def additive(self) -> None:
        """Its entries are not in the coordinates of the hidden states."""

    def _trained(self) -> TrainableCodes | None:
        return self.inner if isinstance(self.inner, TrainableCodes) else None

    def dense(self) -> tuple[Tensor, Tensor | None] | None:
        found = self.inner.dense()
        return None if found is None else (found[0] @ self.weight.float(), found[1])

    def resize(self, vocab: int) -> ProjectedHead:
        new = ProjectedHead(self.in_features, vocab, self.inner.resize(vocab))
        new.transform, new.weight = self.transform, self.weight
        return new
