"""ggml's number formats that cut a row into blocks of 32, and rows on their grids chosen by error feedback."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.bitpack import pack
from hf_softheads.heads.fit.gptq import nearest_code, round_with_feedback
from hf_softheads.heads.fit.hessian import rows_by_moment

BLOCK = 32
_SHRINK = torch.linspace(1.0, 0.6, 12).tolist()  # of the largest weight: where a grid may end
_SHRINK_BOTH = torch.linspace(1.0, 0.7, 5).tolist()  # of the range's lower and upper half
_LEAST = 2.0**-24  # the smallest fp16 number: no scale is 0


@dataclass(frozen=True)
class GgmlType:
    """`w = scale · levels[code] + minimum` in blocks of 32 columns, scale and minimum in fp16.

    Only `affine` types have a minimum.
    """

    name: str
    width: int  # bits of a code
    levels: tuple[float, ...]
    affine: bool = False

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return self.width + (32 if self.affine else 16) / BLOCK


def _integers(name: str, width: int, first: int) -> GgmlType:
    levels = tuple(float(first + i) for i in range(2**width))
    return GgmlType(name, width, levels, affine=first == 0)


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TYPES = {
    t.name: t
    for t in (
        _integers("Q4_0", 4, -8),
        GgmlType("IQ4_NL", 4, tuple(map(float, _IQ4_NL))),
        _integers("Q4_1", 4, 0),
        _integers("Q5_0", 5, -16),
        _integers("Q5_1", 5, 0),
        _integers("Q8_0", 8, -128),
    )
}
"""By name, the smallest first."""


@dataclass(frozen=True)
class Blocks:
    """Rows in a format: scales and minima `(V, D / 32)` fp32, each an fp16 number, and codes `(V, D)` uint8."""

    type: GgmlType
    scale: Tensor
    minimum: Tensor
    codes: Tensor

    def rows(self, which: slice | Tensor = slice(None)) -> Tensor:
        """The numbers that a reader of the file sees, `(n, D)` fp32."""
        levels = torch.tensor(self.type.levels, device=self.codes.device)[self.codes[which].long()]
        cut = levels.view(len(levels), -1, BLOCK) * self.scale[which].unsqueeze(-1)
        return (cut + self.minimum[which].unsqueeze(-1)).flatten(1)

    def packed(self) -> Tensor:
        """As ggml stores them, `(V, bytes)` uint8: of each block the scale, the minimum, the fifth bits, the codes."""
        cut = self.codes.view(len(self.codes), -1, BLOCK)
        parts = [_fp16_bytes(self.scale)]
        if self.type.affine:
            parts.append(_fp16_bytes(self.minimum))
        if self.type.width == 8:
            parts.append(cut ^ 128)  # two's complement of code - 128
        else:
            if self.type.width == 5:
                fifth = pack((cut >> 4).flatten(0, 1), 1)
                parts.append(fifth.view(*cut.shape[:2], 4))
            parts.append((cut[..., : BLOCK // 2] & 15) | ((cut[..., BLOCK // 2 :] & 15) << 4))
        return torch.cat(parts, -1).flatten(1)


def _fp16_bytes(numbers: Tensor) -> Tensor:
    return numbers.half().unsqueeze(-1).view(torch.uint8)


@torch.no_grad()
def fit_blocks(weight: Tensor, type: GgmlType, metrics: tuple[Tensor, Tensor] | None) -> Blocks:
    """Rows of `weight (V, D)` on the format's grid, columns rounded one by one with the error fed forward.

    Args:
        metrics: as `local_moments` gives them; None: every direction of hidden states counts the same.
    """
    vocab, dim = weight.shape
    device = weight.device
    scale = torch.empty(vocab, dim // BLOCK, device=device)
    minimum = torch.zeros_like(scale)
    codes = torch.empty(vocab, dim, dtype=torch.uint8, device=device)
    levels = torch.tensor(type.levels, device=device)
    last = torch.full((dim,), float(len(levels) - 1), device=device)
    for moment, mine in rows_by_moment(weight, metrics, type.name):
        rows = weight[mine].float()
        importance = moment.diagonal().float()
        choose = _range if type.affine else _scale
        scale[mine], minimum[mine] = choose(rows, importance, levels)
        step = scale[mine].repeat_interleave(BLOCK, 1)
        offset = minimum[mine].repeat_interleave(BLOCK, 1)
        order = importance.argsort(descending=True)
        codes[mine] = round_with_feedback(rows, step, offset, last, moment, order, levels=levels)
    return Blocks(type, scale, minimum, codes)


def _scale(rows: Tensor, importance: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of least weighted squared error, the largest number of a block at either end of the levels; minima 0."""
    cut = rows.view(len(rows), -1, BLOCK)
    largest = cut.gather(-1, cut.abs().argmax(-1, keepdim=True))
    best = _Best(cut, importance, levels)
    for end in (levels[0], levels[-1]):
        for shrink in _SHRINK if len(levels) < 256 else _SHRINK[:1]:
            best.offer(largest * (shrink / end), torch.zeros_like(largest))
    return best.scale, best.minimum


def _range(rows: Tensor, importance: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of least weighted squared error, the range of a block drawn in on both sides."""
    cut = rows.view(len(rows), -1, BLOCK)
    low, high = cut.amin(-1, keepdim=True), cut.amax(-1, keepdim=True)
    middle = cut.mean(-1, keepdim=True)
    best = _Best(cut, importance, levels)
    for below in _SHRINK_BOTH:
        for above in _SHRINK_BOTH:
            start, stop = middle + below * (low - middle), middle + above * (high - middle)
            best.offer((stop - start) / levels[-1], start)
    return best.scale, best.minimum


class _Best:
    """The grid of least weighted squared error of those that were offered, block by block."""

    def __init__(self, cut: Tensor, importance: Tensor, levels: Tensor):
        self.cut, self.levels = cut, levels
        self.importance = importance.view(1, -1, BLOCK)
        self.scale = torch.zeros(cut.shape[:2], device=cut.device)
        self.minimum = torch.zeros_like(self.scale)
        self.cost = torch.full_like(self.scale, torch.inf)

    def offer(self, scale: Tensor, minimum: Tensor) -> None:
        scale, minimum = scale.half().float(), minimum.half().float()
        scale = torch.where(scale.abs() < _LEAST, _LEAST, scale)
        last = float(len(self.levels) - 1)
        code = nearest_code(self.cut, scale, minimum, last, self.levels)
        error = minimum + scale * self.levels[code.long()] - self.cut
        cost = (error.square_() * self.importance).sum(-1)
        better = cost < self.cost
        self.cost = torch.where(better, cost, self.cost)
        self.scale = torch.where(better, scale.squeeze(-1), self.scale)
        self.minimum = torch.where(better, minimum.squeeze(-1), self.minimum)
