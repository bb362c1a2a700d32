"""Transform coding: bits go where the softmax feels them, column by column and tier by tier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import pack, unpack
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.bit_allocation import water_fill
from hf_softheads.heads.fit.blockwise import blocks, progress
from hf_softheads.heads.fit.gptq import round_through
from hf_softheads.heads.fit.hessian import local_moments, metric_root, weighted_moment
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.heads.fit.tier_codes import coordinates, quantize_tier
from hf_softheads.heads.forms.bit_planes import planes_of, read_codes
from hf_softheads.heads.forms.kernel_rows import KernelRowsHead
from hf_softheads.heads.forms.token_blocks import token_blocks
from hf_softheads.kernels import in_large_pages
from hf_softheads.kernels.quantized import quantized_scores
from hf_softheads.kernels.rows import Pieces, in_order, transform_coded_rows
from hf_softheads.kernels.transform_coded import Plane, Tiles, make_tiles, transform_coded_scores
from hf_softheads.registry import Bounds, Count, Positive

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_BLOCK = 4096
_COLUMNS = 64  # packed at once
_GAP = (
    32  # numbers between columns: powers of two apart, they would meet in the same lines of a cache
)


@dataclass(frozen=True)
class TransformCoded(HeadSpec, name="transform_coded"):
    """`logit_v = gain_v Σ_j (scale_tj q_vj + offset_tj) x_j + center · h`, `x = weight · basis h`, t the tier of v.

    The rows in the basis in which their errors matter independently (the Karhunen-Loève basis of `λ^{1/2} W Σ^{1/2}`,
    `Σ = E[h hᵀ]`, `λ_v = E[p_v(1-p_v)]`: the softmax-aware metric of SoftWater, arXiv 2608.12026), each column of each
    tier of equally important tokens in 0 to 8 bits by reverse water-filling: a bit more for every factor 4 in
    `λ · variance`. The basis is stored in 4 bits an entry, and the coordinates are those for it as stored. Rounding
    errors are passed on to later columns in the metric of each row's own contexts.

    Attributes:
        bits: per weight of the dense matrix, everything included (basis, scales, tiers) with parameters in bf16.
        rank: columns of the basis; None: D.
        tiers: number of token classes, each twice as large as the one before.
    """

    bits: Positive
    rank: Count | None = None
    tiers: Annotated[int, Bounds(at_least=1, at_most=16)] = 8

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        fixed = cls(bits=1.0)._overhead(dim, vocab) * 8 / (dim * vocab)
        return [cls(bits=round(fixed + bits, 2)) for bits in (0.5, 1.0, 2.0, 3.0, 4.0)]

    def check(self, dim: int, vocab: int) -> None:
        if self.rank is not None and self.rank > dim:
            raise ValueError(f"transform_coded asked for rank {self.rank}; 1 to {dim} are possible")
        least = self._overhead(dim, vocab) * 8 / (dim * vocab)
        if not least < self.bits <= 9 + least:
            raise ValueError(
                f"transform_coded asked for {self.bits} bits per weight; its tables alone take {least:.3f} for a "
                f"({vocab}, {dim}) matrix, so more than that and at most {9 + least:.1f} is possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> TransformCodedHead:
        size = int(self.bits * dim * vocab / 8) - self._overhead(dim, vocab)
        return TransformCodedHead(dim, vocab, self.rank or dim, self.tiers, size, bias=bias)

    def _overhead(self, dim: int, vocab: int) -> int:
        """Bytes of everything but the codes, parameters in bf16."""
        rank = self.rank or dim
        basis = rank * -(-dim // 2)
        return basis + 2 * (rank + dim + 2 * self.tiers * rank) + self.tiers * rank + vocab

    @torch.no_grad()
    def fit(
        self, head: TransformCodedHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        vocab, dim = weight.shape
        device = weight.device
        importance = torch.ones(vocab, device=device)
        root = inverse = torch.eye(dim, dtype=torch.float64, device=device)
        labels, moments = torch.zeros(vocab, dtype=torch.long, device=device), root[None]
        if stats is not None:
            importance = stats.curvature.to(device)
            root, inverse = (r.to(device) for r in metric_root(stats))
            labels, moments = local_moments(stats, weight)
        share = importance / importance.sum()
        center = torch.zeros(dim, device=device)  # what the softmax does not see
        for which in blocks(vocab):
            center += share[which] @ weight[which].float()
        center = center.bfloat16().float()
        moment = root.T @ weighted_moment(weight, share, lambda _: center).double() @ root
        vectors = torch.linalg.eigh(moment)[1].flip(1)[:, : self.rank or dim]
        basis = vectors.T @ inverse
        scale = basis.abs().amax(1).div(7).bfloat16().double()
        codes = (basis / scale[:, None]).round()
        head.basis.copy_(pack(codes + 8, 4))
        head.weight.copy_(scale)
        head.center.copy_(center)
        basis = codes * scale[:, None]  # as stored; the coordinates below are exact for it
        second = root @ root.T
        project = torch.linalg.solve(basis @ second @ basis.T, basis @ second).T.float()

        order = importance.argsort(descending=True, stable=True)
        for tier, (start, stop) in enumerate(head.ranges):
            head.tier_gain[order[start:stop]] = tier
        tokens = head.token_of_row()
        gains = torch.empty(vocab, dtype=torch.uint8, device=device)
        energy = torch.empty(self.tiers, len(basis), device=device)
        for tier, (start, stop) in enumerate(head.ranges):
            mine = tokens[start:stop]
            points = coordinates(weight, mine, center, project)
            deviation = (points.norm(dim=0) / len(points) ** 0.5).clamp_min(1e-30)
            for which in blocks(len(points)):
                size = (points[which] / deviation).square().mean(1).sqrt()
                gains[start:stop][which] = _gain_code(size)
            gain = _gain_value(gains[start:stop])
            spread = points.div_(gain[:, None]).var(0, correction=0)
            energy[tier] = spread * (importance[mine] * gain.square()).mean()
        head.tier_gain[tokens] += gains << 4
        sizes = [stop - start for start, stop in head.ranges]
        head.bits.copy_(water_fill(energy, sizes, len(head.codes)))
        del points, spread
        for moment in moments:  # in place: they are as large as the rows of a tier
            moment[: len(basis), : len(basis)] = basis @ moment @ basis.T
        metrics = moments[:, : len(basis), : len(basis)]
        for tier, (start, stop) in progress(list(enumerate(head.ranges)), "tiers"):
            mine = tokens[start:stop]
            points = coordinates(weight, mine, center, project)
            points /= head.gain()[start:stop, None]
            quantize_tier(head, tier, points, labels[mine], metrics)
            del points
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias[tokens])


def _gain_code(gain: Tensor) -> Tensor:
    """Size of a row beside the others of its tier on a logarithmic scale, 4 of 16 codes an octave, uint8."""
    return (gain.clamp_min(1e-30).log2() * 4 + 10).round().clamp(0, 15).to(torch.uint8)


def _gain_value(code: Tensor) -> Tensor:
    return torch.exp2((code.float() - 10) / 4)


class TransformCodedHead(KernelRowsHead):
    """`weight (K,)`, `scale` and `offset (T, K)` and `center (D,)` train, in `repair_head` the codes too."""

    kernel = "transform_coded"
    code_lr = 1e-2

    def __init__(self, dim: int, vocab: int, rank: int, tiers: int, size: int, *, bias: bool):
        super().__init__(dim, vocab, bias=bias)
        self.weight = nn.Parameter(torch.empty(rank))
        self.center = nn.Parameter(torch.empty(dim))
        self.scale = nn.Parameter(torch.empty(tiers, rank))
        self.offset = nn.Parameter(torch.empty(tiers, rank))
        self.basis: Tensor
        self.bits: Tensor
        self.tier_gain: Tensor  # of each token: its tier, and 16 times the code of its row's size
        self.codes: Tensor
        self.register_buffer("basis", torch.zeros(rank, -(-dim // 2), dtype=torch.uint8))
        self.register_buffer("bits", torch.zeros(tiers, rank, dtype=torch.uint8))
        self.register_buffer("tier_gain", torch.zeros(vocab, dtype=torch.uint8))
        self.register_buffer("codes", torch.zeros(max(0, size), dtype=torch.uint8))
        ends = [max(1, math.ceil(vocab / 2 ** (tiers - 1 - t))) for t in range(tiers)]
        self.ranges = list(zip([0, *ends[:-1]], ends, strict=True))

    def index_limits(self) -> dict[str, int]:
        return {"bits": 9}

    def token_of_row(self) -> Tensor:
        return self._derived(
            "order", lambda: (self.tier_gain & 15).argsort(stable=True), self.tier_gain
        )

    def gain(self) -> Tensor:
        """Factor of each row, `(V,)` fp32."""
        return self._derived(
            "gain", lambda: _gain_value(self.tier_gain[self.token_of_row()] >> 4), self.tier_gain
        )

    def planes(self) -> list[list[Plane]]:
        """Layout of `codes`, tier by tier; follows from `bits`."""
        return self._derived("planes", lambda: planes_of(self.bits, self.ranges), self.bits)

    def blocks(self) -> Iterator[tuple[int, int]]:
        for start, stop in self.ranges:
            for first in range(start, stop, _BLOCK):
                yield first, min(first + _BLOCK, stop)

    def prepare(self, hidden: Tensor) -> Tensor:
        shift = F.linear(hidden, self.center.unsqueeze(0))
        basis = self._derived("basis", self._basis, self.basis)
        basis = basis.to(hidden.dtype) * self.weight[:, None]
        return torch.cat([F.linear(hidden, basis), shift], -1)

    def _basis(self) -> Tensor:
        return (unpack(self.basis, 4, self.in_features).int() - 8).to(torch.int8)

    def compiled(self, hidden: Tensor) -> Tensor:
        def tiles() -> Tiles:
            return make_tiles(self.ranges, self.planes(), self.codes)

        places = self.row_of_token()
        assert places is not None
        x = quantized_scores(hidden, [self.basis], (4,), self.weight.float()[:, None], middle=8)
        return transform_coded_scores(
            x,
            self._derived("tiles", tiles, self.codes, self.bits),
            self.scale.float(),
            self.offset.float(),
            self.gain(),
            places,
            hidden.float() @ self.center.float(),
        )

    def _unpacked(self, spans: Tensor, x: Tensor) -> Tensor:
        """The rows of some spans, see `transform_coded_rows`, as columns `(K, n)` for a product with states x."""

        def pieces() -> Pieces:
            return Pieces.of(self.ranges, self.planes(), self.gain(), len(self.weight))

        count = int(spans[:, 2].sum())
        return transform_coded_rows(
            self.codes,
            self._derived("pieces", pieces, self.bits, self.tier_gain),
            self.scale.detach().float(),
            self.offset.detach().float(),
            spans,
            x.new_empty(len(self.weight), count + _GAP)[:, :count],
        )

    def unpacked_product(self, x: Tensor, start: int, stop: int) -> Tensor:
        tier = self._tier(start)
        spans = torch.tensor([[tier, start - self.ranges[tier][0], stop - start, start]])
        return x[..., :-1] @ self._unpacked(spans, x) + x[..., -1:]

    def by_blocks(self, x: Tensor) -> Tensor:
        places, order = self.row_of_token(), self.token_of_row()
        assert places is not None
        out = in_large_pages(len(x), self.out_features, dtype=torch.float32)
        states, shift = x[:, :-1].contiguous(), x[:, -1].float().contiguous()
        tiers = (self.tier_gain & 15).int()
        for start, stop, spans, place in token_blocks(order, places, tiers, self.ranges, _BLOCK):
            in_order(states @ self._unpacked(spans, x), place, shift, out[:, start:stop])
        return out

    def _tier(self, row: int) -> int:
        return next(t for t, (_, stop) in enumerate(self.ranges) if row < stop)

    def rows(self, which: slice | Tensor) -> Tensor:
        tier: int | Tensor
        if isinstance(which, slice):  # `blocks` never crosses a tier
            tier = self._tier(which.start)
        else:
            last = torch.tensor([stop for _, stop in self.ranges[:-1]], device=which.device)
            tier = torch.bucketize(which, last, right=True)
        if self.latent is not None:
            codes = round_through(self.latent[which], 2.0 ** self.bits[tier] - 1)
        elif torch.compiler.is_compiling():
            every = torch.arange(self.out_features, device=self.codes.device)
            codes = read_codes(self.codes, self.bits, self.ranges, every[which], tier)
        elif isinstance(which, slice):
            codes = self._unpack(int(tier), which.start, which.stop)
        else:
            assert isinstance(tier, Tensor)
            codes = self._gather(which, tier)
        rows = (codes * self.scale[tier] + self.offset[tier]) * self.gain()[which].unsqueeze(-1)
        return F.pad(rows, (0, 1), value=1.0)

    def unpacked(self) -> Tensor:
        return torch.cat([self._unpack(t, *ends) for t, ends in enumerate(self.ranges)])

    def pack(self, codes: Tensor) -> None:
        for tier, (start, stop) in enumerate(self.ranges):
            highest = 2.0 ** self.bits[tier] - 1
            self.pack_tier(tier, codes[start:stop].minimum(highest).to(torch.uint8))

    def pack_tier(self, tier: int, codes: Tensor) -> None:
        """Store the codes `(n, K)` uint8 of a tier's rows."""
        for plane in self.planes()[tier]:
            start = plane.start
            for columns in plane.columns.split(_COLUMNS):
                values = (codes[:, columns] >> plane.shift) & (2**plane.width - 1)
                packed = pack(values.T, plane.width).flatten()
                self.codes[start : start + len(packed)] = packed
                start += len(packed)

    def _unpack(self, tier: int, start: int, stop: int) -> Tensor:
        """Codes of some rows of a tier, `(n, K)` fp32."""
        first = self.ranges[tier][0]
        codes = torch.zeros(len(self.weight), stop - start, device=self.codes.device)
        for plane in self.planes()[tier]:
            packed = self.codes[plane.start : plane.stop].view(len(plane.columns), -1)
            begin = (start - first) * plane.width // 8  # a multiple of 8 rows
            end = -(-(stop - first) * plane.width // 8)
            values = unpack(packed[:, begin:end], plane.width, stop - start)
            codes[plane.columns] += values.float() * 2**plane.shift
        return codes.T

    def _gather(self, which: Tensor, tier: Tensor) -> Tensor:
        """Codes of single rows, `(n, K)` fp32."""
        codes = torch.zeros(len(which), len(self.weight), device=self.codes.device)
        for t, (first, _) in enumerate(self.ranges):
            mine = (tier == t).nonzero().flatten()
            row = which[mine] - first
            for plane in self.planes()[t] if len(mine) else ():
                packed = self.codes[plane.start : plane.stop].view(len(plane.columns), -1)
                each = 8 // plane.width
                bits = packed[:, row // each].T >> ((row % each) * plane.width)[:, None].byte()
                values = (bits & (2**plane.width - 1)).float() * 2**plane.shift
                codes[mine[:, None], plane.columns] += values
        return codes

    def notes(self) -> list[str]:
        used = (self.bits > 0).float().mean(1).tolist()
        mean = self.bits.float().mean(1).tolist()
        return [
            "bits per column from the most to the least important tier: "
            + ", ".join(f"{m:.1f}" for m in mean),
            "columns in use: " + ", ".join(f"{u:.0%}" for u in used),
        ]
