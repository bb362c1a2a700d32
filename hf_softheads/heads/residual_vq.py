"""Residual (additive) vector quantization: a row is a sum of one code per stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import HeadSpec, index_dtype
from hf_softheads.heads.metric import metric_root
from hf_softheads.heads.rows import RowsHead
from hf_softheads.kmeans import kmeans, require_finite, weighted_means

if TYPE_CHECKING:
    from hf_softheads.stats import HeadStats

_FITTED_ROWS = 65536  # codebooks are fitted to so many rows, those that matter most
_ROUNDS = 4  # of assignment and codebook update after the greedy start
_ELEMENTS = 2**24


@dataclass(frozen=True)
class ResidualVQ(HeadSpec, name="residual_vq"):
    """`logit_v = Σ_s weight[s, code_vs] · h`: VQ-Logits with several codebooks, whose codes add up.

    `codes**stages` possible rows from `stages · codes` stored ones (Chen et al. 2010; for weights AQLM, arXiv
    2401.06118). Stage after stage starts from k-means on what is left; then codes by beam search and codebooks by
    weighted means in turns. Distances in `E[h hᵀ]`, tokens weighted by softmax curvature. A decoding step is a
    `(stages · codes, D)` product and `stages` look-ups per token.

    Attributes:
        stages, codes: bits per weight = stages · log2(codes) / D, and the codebooks.
        beam: partial sums kept in the search.
        seed: of k-means.
    """

    stages: int = 4
    codes: int = 256
    beam: int = 8
    seed: int = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        codes = max(2, min(1024, vocab // 16))
        return [cls(stages, codes) for stages in (1, 2, 4, 8)]

    def check(self, dim: int, vocab: int) -> None:
        if self.stages < 1 or not 2 <= self.codes <= vocab or self.beam < 1:
            raise ValueError(
                f"residual_vq asked for {self.stages} stages of {self.codes} codes and a beam of {self.beam}; "
                f"at least 1 stage, 2 to {vocab} codes and a beam of at least 1 are possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> ResidualVQHead:
        return ResidualVQHead(dim, vocab, self.stages, self.codes, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: ResidualVQHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        vocab, dim = weight.shape
        share = torch.ones(vocab, device=weight.device)
        root = inverse = torch.eye(dim, device=weight.device)
        if stats is not None:
            share = stats.curvature.to(weight.device)
            root, inverse = (r.to(weight.device).float() for r in metric_root(stats))
        train = share.topk(min(vocab, _FITTED_ROWS)).indices.sort().values
        points, mass = weight[train].float() @ root, share[train]
        rest, books = (
            points.clone(),
            torch.empty(self.stages, self.codes, dim, device=weight.device),
        )
        for stage in range(self.stages):
            found = kmeans(rest, self.codes, weights=mass, seed=self.seed + stage)
            books[stage] = found.centers
            rest -= found.centers[found.labels]
        for _ in range(_ROUNDS if self.stages > 1 else 0):
            codes = _beam_search(points, books, self.beam)
            for stage in range(self.stages):
                others = points - _sum(books, codes) + books[stage, codes[:, stage]]
                used = torch.bincount(codes[:, stage], minlength=self.codes) > 0
                means = weighted_means(others, codes[:, stage], self.codes, mass)
                books[stage] = torch.where(used[:, None], means, books[stage])
        for start in range(0, vocab, 8192):
            part = weight[start : start + 8192].float() @ root
            head.codes[start : start + 8192] = _beam_search(part, books, self.beam).to(
                head.codes.dtype
            )
        head.weight.copy_(books @ inverse)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


def _sum(books: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([book[codes[:, s]] for s, book in enumerate(books)]).sum(0)


def _beam_search(points: Tensor, books: Tensor, beam: int) -> Tensor:
    """Codes `(N, S)` whose sum is near each point: the `beam` best partial sums survive a stage."""
    _, codes, dim = books.shape
    norms = books.square().sum(-1)
    found = []
    for part in points.split(max(1, _ELEMENTS // (beam * max(codes, dim)))):
        count = len(part)
        rest = part.unsqueeze(1)  # (n, 1, D): what is left after each kept partial sum
        cost = part.square().sum(-1, keepdim=True)
        chosen = torch.empty(count, 1, 0, dtype=torch.long, device=points.device)
        for book, norm in zip(books, norms, strict=True):
            trial = cost.unsqueeze(-1) + norm - 2 * (rest @ book.T)  # (n, kept, C)
            cost, best = trial.flatten(1).topk(min(beam, trial[0].numel()), largest=False)
            kept, code = best // codes, best % codes
            before = chosen.gather(1, kept.unsqueeze(-1).expand(-1, -1, chosen.shape[-1]))
            chosen = torch.cat([before, code.unsqueeze(-1)], -1)
            rest = rest.gather(1, kept.unsqueeze(-1).expand(-1, -1, dim)) - book[code]
        found.append(chosen[:, 0])
    return torch.cat(found)


class ResidualVQHead(RowsHead):
    """`weight (S, C, D)` trains, the codes `(V, S)` are fixed. Scores are sums of entries of one small table."""

    def __init__(self, dim: int, vocab: int, stages: int, codes: int, *, bias: bool):
        super().__init__(dim, vocab, bias=bias)
        self.weight = nn.Parameter(torch.empty(stages, codes, dim))
        self.codes: Tensor
        self.register_buffer("codes", torch.zeros(vocab, stages, dtype=index_dtype(codes)))

    def prepare(self, hidden: Tensor) -> Tensor:
        """The product of every code with h, `(…, S · C)` fp32: the coordinates in which a row is S ones."""
        return F.linear(hidden, self.weight.flatten(0, 1)).float()

    def dense(self) -> None:
        """None: chunks of the small table are cheaper than rows."""
        return

    def scores(self, hidden: Tensor) -> Tensor:
        return self._block(self.prepare(hidden), 0, self.out_features)

    def rows(self, which: slice | Tensor) -> Tensor:
        codes = self.codes[which].long()
        return torch.stack([book[codes[:, s]] for s, book in enumerate(self.weight)]).sum(0)

    def _block(self, x: Tensor, start: int, stop: int) -> Tensor:
        table = x.reshape(-1, x.shape[-1])
        scores: Tensor | float = 0.0
        for place in self._index()[:, start:stop]:
            scores = table.index_select(1, place) + scores
        if self.bias is not None:
            scores = scores + self.bias[start:stop]
        assert isinstance(scores, Tensor)
        return scores.view(*x.shape[:-1], stop - start)

    def _index(self) -> Tensor:
        """Where in the table the codes of each token are, `(S, V)` int32."""

        def build() -> Tensor:
            stages, codes, _ = self.weight.shape
            shift = torch.arange(stages, device=self.codes.device) * codes
            return (self.codes.long() + shift).T.int().contiguous()

        return self._derived("index", build, self.codes)

    def code_table(self) -> tuple[Tensor, int]:
        return self.codes.long(), self.weight.shape[1]

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel() + self.codes.numel()
