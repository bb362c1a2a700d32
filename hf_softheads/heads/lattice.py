"""Rows in points of the E8 lattice, eight columns to two bytes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn

from hf_softheads.compiling import constant
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.blockwise import progress
from hf_softheads.heads.fit.hadamard import random_signs, signed_hadamard
from hf_softheads.heads.fit.hessian import local_moments
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.heads.forms.streamed_rows import RowsHead
from hf_softheads.registry import Bounds, CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_WIDTH = 8  # columns a code
_ROWS = 4096  # fitted at once
_POINTS = 2**13  # compared with all shapes at once
_SIZES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)  # of a lattice unit over the columns' RMS, tried
_SAMPLE = 256  # rows on which they are


@dataclass(frozen=True)
class Lattice(HeadSpec, name="lattice"):
    """`row_v = Σ_i s_vi p_vi R`, `p_vi` eight columns at a time one of 65,536 points of E8 shifted by ±1/4.

    Source: the E8P codebook of QuIP#, arXiv 2402.04396: the densest packing in eight dimensions, cut to the ball that
    holds most of a Gaussian. A point is one of 256 vectors of halves `1/2, 3/2, 5/2` with seven free signs (the eighth
    makes the sum even) and one shift. R is a Hadamard transform of blocks of columns with random signs, after which
    columns are nearly Gaussian. Each further stage codes what the stages before left. With `HeadStats` the error of
    every eight columns is passed on to the later ones in the metric of each row's own contexts, and the scales are
    least squares in it. Two bits a stage and weight, one scale a stage and row. No kernel.

    Attributes:
        stages: of 2 bits a weight, 1 to 4.
        seed: of the signs.
    """

    stages: Annotated[int, Bounds(at_least=1, at_most=4)] = 1
    seed: CountOrZero = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(stages) for stages in (1, 2, 3)] if dim % _WIDTH == 0 else []

    def check(self, dim: int, vocab: int) -> None:
        if dim % _WIDTH:
            raise ValueError(
                f"lattice codes {_WIDTH} columns at a time, which do not divide hidden states of size {dim}; quantized "
                "takes any size"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> LatticeHead:
        return LatticeHead(dim, vocab, self.stages, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: LatticeHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        vocab, dim = weight.shape
        head.signs.copy_(random_signs(dim, self.seed))
        labels = torch.zeros(vocab, dtype=torch.long, device=weight.device)
        moments = torch.eye(dim, dtype=torch.float64, device=weight.device)[None]
        if stats is not None:
            labels, moments = local_moments(stats, weight)
        parts = [
            (cluster, mine)
            for cluster in range(len(moments))
            for mine in (labels == cluster).nonzero().flatten().split(_ROWS)
        ]
        size = None
        for cluster, mine in progress(parts, "lattice"):
            moment = head.prepare(head.prepare(moments[cluster]).T)
            rest = head.prepare(weight[mine].float())
            rows = rest.clone()
            found = torch.zeros_like(rest)
            for stage in range(self.stages):
                rms = rest.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
                size = size or _best_size(rest[:_SAMPLE] / rms[:_SAMPLE])
                unit = (rms * size).bfloat16().float()
                shape, sign = _round_with_feedback(rest / unit, moment)
                points = _points(shape, sign)
                metric = moment.to(points)
                top = ((points @ metric) * rest).sum(1)
                unit = (top / ((points @ metric) * points).sum(1).clamp_min(1e-30)).bfloat16()
                head.shapes[stage, mine], head.signs_of[stage, mine] = shape, sign
                head.weight[mine, stage] = unit.to(head.weight.dtype)
                found += unit.float()[:, None] * points
                rest = rows - found
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


@constant
def halves() -> Tensor:
    """The 256 vectors of halves, `(256, 8)`: all of squared norm up to 10 and the first 29 of norm 12."""
    return _codebook()


@cache
def _codebook() -> Tensor:
    found = itertools.product((0.5, 1.5, 2.5), repeat=_WIDTH)
    near = [v for v in found if sum(x * x for x in v) <= 12]
    near.sort(key=lambda v: (sum(x * x for x in v), v))
    return torch.tensor(near[:256])


def nearest_points(values: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and signs, uint8 `(N,)` each, of the codebook's point nearest to each of `values (N, 8)`; exact."""
    table = halves().to(values)
    odd = table.sum(1).long() % 2 == 1  # an odd number of signs must be negative
    norms = table.square().sum(1)
    bits = 2 ** torch.arange(_WIDTH - 1, device=values.device)
    shape = torch.empty(len(values), dtype=torch.uint8, device=values.device)
    sign = torch.empty_like(shape)
    for which in torch.arange(len(values), device=values.device).split(_POINTS):
        tried = []
        for shift in (-0.25, 0.25):
            moved = values[which] - shift
            size, negative = moved.abs(), moved < 0
            cost = torch.addmm(norms, size, table.T, alpha=-2) + size.square().sum(1, keepdim=True)
            # another parity of the signs costs one flip, where it costs least
            flip = size[:, None, :] * table
            least, place = flip.min(-1)
            wrong = (negative.sum(1) % 2 == 1)[:, None] != odd
            cost = torch.where(wrong, cost + 4 * least, cost)
            cheapest, code = cost.min(1)
            one = torch.arange(len(which), device=values.device)
            turn = wrong[one, code]
            negative[one[turn], place[one, code][turn]] ^= True
            packed = (negative[:, :-1] * bits).sum(1) + 128 * (shift > 0)
            tried.append((cheapest, code, packed))
        (cost_a, code_a, sign_a), (cost_b, code_b, sign_b) = tried
        better = cost_b < cost_a
        shape[which] = torch.where(better, code_b, code_a).to(torch.uint8)
        sign[which] = torch.where(better, sign_b, sign_a).to(torch.uint8)
    return shape, sign


def _points(shape: Tensor, sign: Tensor) -> Tensor:
    """The points of codes `(…, G)`, `(…, 8 G)` fp32."""
    table = halves().to(shape.device)
    size = table[shape.long()]
    bits = torch.arange(_WIDTH - 1, device=sign.device)
    negative = (sign.long().unsqueeze(-1) >> bits) & 1
    odd = (table.sum(1).long() % 2)[shape.long()]
    last = (negative.sum(-1) + odd) % 2
    negative = torch.cat([negative, last.unsqueeze(-1)], -1)
    shift = (sign.long() >> 7).unsqueeze(-1) * 0.5 - 0.25
    points: Tensor = size * (1 - 2 * negative) + shift
    return points.flatten(-2)


def _round_with_feedback(values: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `(R, K / 8)` of `values (R, K)`, each block's error passed on to the later ones as GPTQ does."""
    upper = torch.linalg.cholesky(torch.linalg.inv(moment.double()), upper=True).float()
    rest, groups = values.clone(), values.shape[1] // _WIDTH
    shape = torch.empty(len(values), groups, dtype=torch.uint8, device=values.device)
    sign = torch.empty_like(shape)
    for group in range(groups):
        here = slice(group * _WIDTH, (group + 1) * _WIDTH)
        shape[:, group], sign[:, group] = nearest_points(rest[:, here])
        error = rest[:, here] - _points(shape[:, group, None], sign[:, group, None])
        error = torch.linalg.solve_triangular(upper[here, here], error, upper=True, left=False)
        rest[:, here.stop :] -= error @ upper[here, here.stop :]
    return shape, sign


def _best_size(values: Tensor) -> float:
    """Unit of the lattice, over the columns' RMS, of least squared error on rows of RMS 1."""
    blocks = values.reshape(-1, _WIDTH)

    def error(size: float) -> float:
        points = _points(*(code[:, None] for code in nearest_points(blocks / size)))
        return float((points * size - blocks).square().mean())

    return min(_SIZES, key=error)


class LatticeHead(RowsHead):
    """`weight (V, stages)`, the scales, train; `shapes` and `signs_of (stages, V, D / 8)` are the codes."""

    def __init__(self, dim: int, vocab: int, stages: int, *, bias: bool):
        super().__init__(dim, vocab, bias=bias)
        self.weight = nn.Parameter(torch.empty(vocab, stages))
        self.signs: Tensor  # of the columns before the Hadamard transform
        self.shapes: Tensor
        self.signs_of: Tensor
        self.register_buffer("signs", torch.ones(dim, dtype=torch.int8))
        size = stages, vocab, dim // _WIDTH
        self.register_buffer("shapes", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("signs_of", torch.zeros(size, dtype=torch.uint8))

    def prepare(self, hidden: Tensor) -> Tensor:
        return signed_hadamard(hidden, self.signs)

    def rows(self, which: slice | Tensor) -> Tensor:
        scale = self.weight[which]
        parts = [
            _points(shape[which], sign[which]).to(scale.dtype) * scale[..., stage, None]
            for stage, (shape, sign) in enumerate(zip(self.shapes, self.signs_of, strict=True))
        ]
        rows: Tensor = parts[0]
        for part in parts[1:]:
            rows = rows + part
        return rows

    def notes(self) -> list[str]:
        return [f"{2 * len(self.shapes)} bits a weight in points of the E8 lattice"]
