"""Product quantization: each group of columns has a small codebook of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import PARTS, pack_bits, unpack_bits
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.additive_codes import compose, recentre, recode, refine_codes
from hf_softheads.heads.fit.blockwise import blocks, progress
from hf_softheads.heads.fit.hadamard import factors, random_signs, signed_hadamard
from hf_softheads.heads.fit.hessian import local_moments, metric_root, weighted_moment
from hf_softheads.heads.fit.kmeans import kmeans, nearest, require_finite
from hf_softheads.heads.forms.kernel_rows import KernelRowsHead
from hf_softheads.heads.forms.trainable_codes import Additive
from hf_softheads.kernels import why_not
from hf_softheads.kernels.dense import dense_score
from hf_softheads.kernels.product_vq import make_tiles, product_vq_scores
from hf_softheads.kernels.rows import product_vq_rows
from hf_softheads.registry import Bounds, Count, CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_FITTED_ROWS = 32768  # codebooks are fitted to so many rows, those that matter most
_ROUNDS = 4  # of codes and codebooks in the metric of all groups together
_ROWS = 8192
_ELEMENTS = 2**24  # coordinates of rows held at once


@dataclass(frozen=True)
class ProductVQ(HeadSpec, name="product_vq"):
    """`logit_v = Σ_g weight[g, code_vg] · x_g`, `x = R h` cut into `groups` equal parts.

    VQ-Logits with one codebook per group of columns (Jégou et al. 2011; as an output layer RecJPQ, arXiv 2312.06165):
    `codes**groups` possible rows instead of `codes`. A learned R whitens the hidden state and spreads the variance of
    the rows evenly over the groups (OPQ's eigenvalue allocation, Ge et al. 2013, in the metric `E[h hᵀ]`); it trains
    and costs D² parameters. A structured R, a Hadamard transform after random signs, makes groups alike for D bytes.
    After k-means group by group, codes change in turn so that groups make up for each other's errors.

    Attributes:
        groups: must divide D; bits per weight = groups · log2(codes) / D, and the tables.
        codes: per group, a power of two up to 256.
        rotation: of the hidden state: `learned`, `structured` or `none`.
        seed: of k-means and of the signs.
    """

    groups: Count
    codes: Annotated[int, Bounds(at_least=2, at_most=256)] = 256
    rotation: Literal["learned", "structured", "none"] = "learned"
    seed: CountOrZero = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        groups = [dim // part for part in (8, 4, 2, 1) if dim % part == 0]
        return [cls(g, codes=256 if vocab >= 2**12 else 16) for g in groups]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec | None:
        return cls(dim, codes=256) if vocab <= 256 else None

    def check(self, dim: int, vocab: int) -> None:
        if dim % self.groups:
            valid = [g for g in range(1, dim + 1) if dim % g == 0]
            raise ValueError(
                f"product_vq asked for {self.groups} groups of {dim} columns; they must divide it: {valid}"
            )
        if self.codes not in (2**b for b in PARTS) or self.codes > vocab:
            raise ValueError(
                f"product_vq asked for {self.codes} codes a group; "
                f"a power of two from 2 to {min(256, vocab)} is possible"
            )
        if self.rotation == "structured" and dim % 2:
            raise ValueError(
                f"product_vq asked for a structured rotation of {dim} columns; it turns blocks of a power of two that "
                "divides them, here 1, and so nothing: use learned or none"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> ProductVQHead:
        return ProductVQHead(dim, vocab, self.groups, self.codes, bias=bias, rotation=self.rotation)

    @torch.no_grad()
    def fit(
        self, head: ProductVQHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        vocab, dim = weight.shape
        importance = torch.ones(vocab) if stats is None else stats.curvature
        importance = importance.to(weight.device)
        root = inverse = torch.eye(dim, dtype=torch.float64)
        if stats is not None:
            root, inverse = metric_root(stats)
        if head.signs is not None:
            head.signs.copy_(random_signs(dim, self.seed))
        forward = None
        if head.basis is not None:
            moment = root.T @ weighted_moment(weight, importance).to(root) @ root
            rotation = _balanced_rotation(moment, self.groups)
            head.basis.copy_(rotation.T @ inverse.float())
            forward = (root.float() @ rotation).to(weight.device)
        spread = None  # of the states, in the coordinates of the codes, where it is not 1
        if forward is None:
            spread = head.prepare(root.T.to(weight.device)).T

        def coordinates(rows: Tensor, columns: slice = slice(None)) -> Tensor:
            return head.prepare(rows)[:, columns] if forward is None else rows @ forward[:, columns]

        train = importance.topk(min(vocab, _FITTED_ROWS)).indices.sort().values
        codes = torch.empty(vocab, self.groups, dtype=torch.uint8, device=weight.device)
        width = dim // self.groups
        parts = enumerate(_parts(weight, coordinates, width))
        for group, points in progress(parts, "groups", self.groups):
            metric = None
            if spread is not None:  # the part of the metric that lies within the group
                own = spread[group * width : (group + 1) * width].float()
                metric = torch.linalg.cholesky(own @ own.T)
            found = kmeans(
                points[train], self.codes, weights=importance[train], metric=metric, seed=self.seed
            )
            head.weight[group] = found.centers
            codes[:, group] = nearest(points, found.centers, metric=metric)[0].to(torch.uint8)
        if stats is not None:
            whole = None if spread is None else (spread @ spread.T).float()
            _refine(head, weight, codes, stats, train, coordinates, whole)
        head.store(codes)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


def _refine(
    head: ProductVQHead,
    weight: Tensor,
    codes: Tensor,
    stats: HeadStats,
    train: Tensor,
    coordinates: Callable[[Tensor], Tensor],
    whole: Tensor | None,
) -> None:
    """Let the groups make up for each other's errors: in `whole`, where it is not 1, then in each token's own metric.

    `whole (D, D)` is `E[x xᵀ]`; a token's own metric is that of its contexts.
    """

    def wanted(which: Tensor) -> Tensor:
        return coordinates(weight[which].float())

    books, dim = head.weight.data.float(), weight.shape[1]
    if whole is not None:  # else the groups do not interact on average
        share = stats.curvature.to(weight.device)
        for _ in progress(range(_ROUNDS), "codebooks"):
            parts = train.split(_ROWS)
            for which in parts:
                code = codes[which].long()
                slope = (compose(code, books, head.parts, dim) - wanted(which)) @ whole
                codes[which] = recode(code, slope, books, head.parts, whole)[0].to(codes.dtype)
            code = codes[train].long()
            slope = torch.cat(
                [
                    (compose(codes[which].long(), books, head.parts, dim) - wanted(which)) @ whole
                    for which in parts
                ]
            )
            books = recentre(code, slope, books, head.parts, whole, share[train])
        head.weight.copy_(books)
    labels, moments = local_moments(stats, weight)
    turned = (head.prepare(head.prepare(moment).T) for moment in moments)
    refine_codes(codes, books, head.parts, wanted, labels, turned)


def _parts(
    weight: Tensor, coordinates: Callable[[Tensor, slice], Tensor], width: int
) -> Iterator[Tensor]:
    """The rows' coordinates, `width` at a time, `(V, width)` fp32; several are computed together."""
    vocab, dim = weight.shape
    step = max(1, _ELEMENTS // (vocab * width)) * width
    for first in range(0, dim, step):
        columns = slice(first, min(first + step, dim))
        points = torch.empty(vocab, columns.stop - first, device=weight.device)
        for which in blocks(vocab):
            points[which] = coordinates(weight[which].float(), columns)
        yield from points.split(width, 1)


def _balanced_rotation(moment: Tensor, groups: int) -> Tensor:
    """Principal directions `(D, D)` of a second moment, dealt out so that groups have equal products of variances."""
    values, vectors = torch.linalg.eigh(moment)
    room = len(values) // groups
    content: list[list[int]] = [[] for _ in range(groups)]
    size = [0.0] * groups
    for index in reversed(
        range(len(values))
    ):  # the largest first, each to the group that has least
        group = min((g for g in range(groups) if len(content[g]) < room), key=lambda g: size[g])
        content[group].append(index)
        size[group] += float(values[index].clamp_min(1e-30).log()) + 100
    rotation: Tensor = vectors[:, torch.tensor(content).flatten()].float()
    return rotation


class ProductVQHead(KernelRowsHead):
    """`weight` holds the codebooks `(G, C, D / G)`, `basis (D, D)` a learned rotation; both train, the codes are fixed.

    `signs (D,)` are those of a structured one.
    """

    kernel = "product_vq"

    def __init__(self, dim: int, vocab: int, groups: int, codes: int, *, bias: bool, rotation: str):
        super().__init__(dim, vocab, bias=bias)
        self.bits = (codes - 1).bit_length()
        self.weight = nn.Parameter(torch.empty(groups, codes, dim // groups))
        self.basis = nn.Parameter(torch.empty(dim, dim)) if rotation == "learned" else None
        self.signs: Tensor | None
        structured = rotation == "structured"
        self.register_buffer("signs", torch.ones(dim, dtype=torch.int8) if structured else None)
        for width in PARTS[self.bits]:
            size = -(-groups * width // 8)
            self.register_buffer(f"codes{width}", torch.zeros(vocab, size, dtype=torch.uint8))

    def packed(self) -> list[Tensor]:
        return [getattr(self, f"codes{width}") for width in PARTS[self.bits]]

    def prepare(self, hidden: Tensor) -> Tensor:
        """`R h`, in the dtype of the states: the fit turns moments in fp64."""
        if self.basis is not None:
            return F.linear(hidden, self.basis.to(hidden.dtype))
        return hidden if self.signs is None else signed_hadamard(hidden, self.signs)

    def additive(self) -> Additive:
        basis: Tensor | None = self.basis
        if self.signs is not None:
            basis = self.prepare(torch.eye(self.in_features, device=self.weight.device)).T
        return Additive(self.code_table()[0], self.weight, self.parts, basis, self.store)

    @property
    def parts(self) -> list[slice]:
        """Columns of each group."""
        groups, _, width = self.weight.shape
        return [slice(g * width, (g + 1) * width) for g in range(groups)]

    @torch.no_grad()
    def store(self, codes: Tensor) -> None:
        """Pack codes `(V, G)`."""
        for packed, new in zip(self.packed(), pack_bits(codes, self.bits), strict=True):
            packed.copy_(new)

    def code_table(self) -> tuple[Tensor, int]:
        groups, codes, _ = self.weight.shape
        return unpack_bits(self.packed(), self.bits, groups).long(), codes

    def kernel_or_reason(self, hidden: Tensor) -> str | None:
        if hidden.dtype == torch.float32 and self.kernels == "auto":
            return "its tables have 8 bits, too few for fp32 hidden states"
        return super().kernel_or_reason(hidden)

    def compiled(self, hidden: Tensor) -> Tensor:
        groups, codes, _ = self.weight.shape

        def tiles() -> Tensor:
            return make_tiles(unpack_bits(self.packed(), self.bits, groups), codes)

        def books() -> Tensor:
            return self.weight.detach().float().transpose(1, 2).contiguous()

        return product_vq_scores(
            self._turned(hidden),
            self._derived("tiles", tiles, *self.packed()),
            self._derived("books", books, self.weight),
            self.out_features,
        )

    def unpacked_product(self, x: Tensor, start: int, stop: int) -> Tensor:
        books = self._derived(
            str(x.dtype), lambda: self.weight.detach().to(x.dtype).contiguous(), self.weight
        )
        rows = torch.empty(stop - start, self.in_features, dtype=x.dtype)
        return F.linear(x, product_vq_rows(self.packed(), PARTS[self.bits], books, start, rows))

    def _turned(self, hidden: Tensor) -> Tensor:
        """`R h` in fp32: for one state torch's bf16 product reads a matrix at half the speed of our own."""
        basis = self.basis
        if basis is None or basis.dtype != torch.bfloat16 or len(hidden) > 1 or why_not("dense"):
            return self.prepare(hidden).float()
        turned: Tensor = dense_score(basis, hidden, torch.arange(len(basis)).unsqueeze(0))
        return turned

    def rows(self, which: slice | Tensor) -> Tensor:
        groups, codes, width = self.weight.shape
        parts = [p[which] for p in self.packed()]
        index = unpack_bits(parts, self.bits, groups).int()
        index = index + torch.arange(groups, dtype=torch.int32, device=index.device) * codes
        return F.embedding(index, self.weight.view(groups * codes, width)).flatten(1)

    @property
    def flops(self) -> int:
        """With one table of products per group: a product per codebook entry, an addition per token and group."""
        groups, codes, width = self.weight.shape
        rotation = 0 if self.basis is None else 2 * self.basis.numel()
        if self.signs is not None:
            rotation = 2 * self.in_features * sum(factors(self.in_features))
        return rotation + 2 * codes * width * groups + groups * self.out_features
