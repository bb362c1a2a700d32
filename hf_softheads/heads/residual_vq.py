"""Residual (additive) vector quantization: a row is a sum of one code per stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.additive_codes import refine_codes
from hf_softheads.heads.fit.blockwise import blocks, progress
from hf_softheads.heads.fit.hessian import local_moments, metric_root
from hf_softheads.heads.fit.kmeans import kmeans, require_finite, weighted_means
from hf_softheads.heads.forms.streamed_rows import RowsHead
from hf_softheads.heads.forms.trainable_codes import Additive
from hf_softheads.registry import Bounds, Count, CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_FITTED_ROWS = 65536  # codebooks are fitted to so many rows, those that matter most
_ROUNDS = 4  # of assignment and codebook update after the greedy start
_ELEMENTS = 2**24


@dataclass(frozen=True)
class ResidualVQ(HeadSpec, name="residual_vq"):
    """`logit_v = Σ_s weight[s, code_vs] · h`: VQ-Logits with several codebooks, whose codes add up.

    `codes**stages` possible rows from `stages · codes` stored ones (Chen et al. 2010; for weights AQLM, arXiv
    2401.06118). Stage after stage starts from k-means on what is left; then codes by beam search and codebooks by
    weighted means in turns. Distances in `E[h hᵀ]`, tokens weighted by softmax curvature; at last two sweeps of
    coordinate descent in the metric of each token's own contexts. A decoding step is a
    `(stages · codes, D)` product and `stages` look-ups per token.

    Attributes:
        stages, codes: bits per weight = stages · log2(codes) / D, and the codebooks.
        beam: partial sums kept in the search.
        seed: of k-means.
    """

    stages: Count = 4
    codes: Annotated[int, Bounds(at_least=2)] = 256
    beam: Count = 8
    seed: CountOrZero = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        codes = max(2, min(1024, vocab // 16))
        return [cls(stages, codes) for stages in (1, 2, 4, 8)]

    def check(self, dim: int, vocab: int) -> None:
        if self.codes > vocab:
            raise ValueError(
                f"residual_vq asked for {self.codes} codes a stage; 2 to {vocab} are possible"
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
        mass = share[train]
        points = torch.empty(len(train), dim, device=weight.device)
        for which in blocks(len(train)):
            points[which] = weight[train[which]].float() @ root
        rest = points.clone()
        books = torch.empty(self.stages, self.codes, dim, device=weight.device)
        for stage in range(self.stages):
            description = f"stage {stage + 1} of {self.stages}"
            found = kmeans(
                rest, self.codes, weights=mass, seed=self.seed + stage, description=description
            )
            books[stage] = found.centers
            _add(rest, found.centers, found.labels, -1)
        for _ in range(_ROUNDS if self.stages > 1 else 0):
            codes = _beam_search(points, books, self.beam)
            rest.copy_(points)
            for book, code in zip(books, codes.T, strict=True):
                _add(rest, book, code, -1)
            for book, code in zip(books, codes.T, strict=True):
                _add(rest, book, code, 1)
                used = torch.bincount(code, minlength=self.codes) > 0
                means = weighted_means(rest, code, self.codes, mass)
                book.copy_(torch.where(used[:, None], means, book))
                _add(rest, book, code, -1)
        del points, rest
        for which in progress(list(blocks(vocab)), "codes"):
            part = weight[which].float() @ root
            head.codes[which] = _beam_search(part, books, self.beam).to(head.codes.dtype)
        head.weight.copy_(books @ inverse)
        if stats is not None:
            labels, moments = local_moments(stats, weight)
            parts, books = head.additive().parts, head.weight.data.float()
            refine_codes(
                head.codes, books, parts, lambda which: weight[which].float(), labels, moments
            )
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


def _add(points: Tensor, book: Tensor, codes: Tensor, sign: int) -> None:
    """Add `sign` times its entry of the codebook to each point, in place, a block of rows at a time."""
    for which in blocks(len(points)):
        points[which].add_(book[codes[which]], alpha=sign)


def _beam_search(points: Tensor, books: Tensor, beam: int) -> Tensor:
    """Codes `(N, S)` whose sum is near each point: the `beam` best partial sums survive a stage.

    `‖x - Σ c‖²` needs only the products of a point with all entries and of the entries with each other.
    """
    stages, codes, dim = books.shape
    entries = books.flatten(0, 1)
    tables = [entries[: s * codes] @ (2 * book).T for s, book in enumerate(books)]
    norms = books.square().sum(-1)
    found = torch.empty(len(points), stages, dtype=torch.long, device=points.device)
    parts = points.split(step := max(1, _ELEMENTS // (max(beam, stages) * max(codes, dim))))
    for place, part in progress(list(enumerate(parts)), "beam search"):
        count = len(part)
        alone = norms - 2 * (part @ entries.T).view(count, stages, codes)
        cost = part.square().sum(-1, keepdim=True)  # (n, kept)
        chosen = torch.empty(count, 1, 0, dtype=torch.long, device=points.device)
        for stage in range(stages):
            trial = cost.unsqueeze(-1) + alone[:, stage, None]  # (n, kept, C)
            for earlier in range(stage):
                trial += F.embedding(chosen[..., earlier] + earlier * codes, tables[stage])
            cost, best = trial.flatten(1).topk(min(beam, trial[0].numel()), largest=False)
            kept, code = best // codes, best % codes
            before = chosen.gather(1, kept.unsqueeze(-1).expand(-1, -1, stage))
            chosen = torch.cat([before, code.unsqueeze(-1)], -1)
        found[place * step : place * step + count] = chosen[:, 0]
    return found


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

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.rows(slice(None)).float(), None if self.bias is None else self.bias.float()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.rows(tokens).float()

    def additive(self) -> Additive:
        parts = [slice(0, self.in_features)] * len(self.weight)
        return Additive(self.codes.long(), self.weight, parts, None, self.store)

    @torch.no_grad()
    def store(self, codes: Tensor) -> None:
        """Put codes `(V, S)` in."""
        self.codes.copy_(codes)

    def scores(self, hidden: Tensor) -> Tensor:
        return self._block(self.prepare(hidden), 0, self.out_features)

    def score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        table, scores = self.prepare(hidden), hidden.new_zeros((), dtype=torch.float32)
        for place in self._index():
            scores = scores + table.gather(-1, place[tokens].long())
        return scores if self.bias is None else scores + self.bias[tokens]

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.score(hidden, tokens.expand(*hidden.shape[:-1], -1))

    def rows(self, which: slice | Tensor) -> Tensor:
        codes = self.codes[which].long()
        rows: Tensor = sum(
            (F.embedding(code, book) for code, book in zip(codes.T, self.weight, strict=True)),
            start=self.weight.new_zeros(()),
        )
        return rows

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

    def index_limits(self) -> dict[str, int]:
        return {"codes": self.weight.shape[1]}

    def code_table(self) -> tuple[Tensor, int]:
        return self.codes.long(), self.weight.shape[1]

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel() + self.codes.numel()
