"""Scores of a transform coded head from its codes, brought once into the order in which the kernel reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_softheads.bitpack import pack, unpack
from hf_softheads.kernels import STATES, call, in_large_pages, load

_TILE = 64  # rows, as in tiles.hpp
_ROWS = 8192  # brought into order at once


class Plane(NamedTuple):
    """Some bits of some columns of a tier: where in `codes` they are, `(columns, bytes)`."""

    columns: Tensor
    width: int
    shift: int
    start: int
    stop: int


class Tiles(NamedTuple):
    """All codes of a head as the kernel reads them; the fields are its arguments."""

    codes: Tensor
    tiers: Tensor  # (T, 3) int64: first row, rows, where in `codes`
    planes: Tensor  # (P, 4) int64: tier, width, shift, columns
    columns: Tensor  # int32


def make_tiles(
    ranges: Sequence[tuple[int, int]], planes: Sequence[Sequence[Plane]], codes: Tensor
) -> Tiles:
    """Tiles of the rows `start … stop - 1` of each tier and of its planes."""
    parts, spans, kinds, columns, size = [], [], [], [], 0
    for number, ((start, stop), own) in enumerate(zip(ranges, planes, strict=True)):
        spans.append((start, stop - start, size))
        for plane in own:
            kinds.append((number, plane.width, plane.shift, len(plane.columns)))
            columns.append(plane.columns.int())
        for first in range(0, stop - start, _ROWS):
            rows = min(_ROWS, stop - start - first)
            cut = [_words(plane, codes, first, rows) for plane in own]
            if cut:
                parts.append(torch.cat(cut, 1).flatten())
                size += parts[-1].numel()
    codes = in_large_pages(size, dtype=torch.uint8)
    return Tiles(
        torch.cat(parts, out=codes) if parts else codes,
        torch.tensor(spans),
        torch.tensor(kinds).view(-1, 4),
        torch.cat(columns) if columns else torch.zeros(0, dtype=torch.int32),
    )


def _words(plane: Plane, codes: Tensor, first: int, rows: int) -> Tensor:
    """`(tiles, bytes of a tile)`: [word][row][4 bytes] of some rows, packed along the columns."""
    stored = codes[plane.start : plane.stop].view(len(plane.columns), -1)
    part = stored[:, first * plane.width // 8 : -(-(first + rows) * plane.width // 8)]
    packed = pack(unpack(part, plane.width, rows).T, plane.width)
    filled = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4, 0, -rows % _TILE))
    tiles = filled.view(-1, _TILE, filled.shape[1] // 4, 4)
    return tiles.transpose(1, 2).flatten(1)


def transform_coded_scores(
    x: Tensor,
    tiles: Tiles,
    scale: Tensor,
    offset: Tensor,
    gain: Tensor,
    places: Tensor,
    base: Tensor,
    *,
    instructions: str = "native",
) -> Tensor:
    """`gain_v Σ_j (scale_tj q_vj + offset_tj) x_j + base`, `(B, V)` fp32 in the order of the tokens.

    Args:
        x: `(B, K)`; scale, offset: `(T, K)`; gain: of each row, `(V,)`; base: `(B,)`. All fp32.
        places: row of each token, `(V,)` int32.
    """
    fp32 = [t.contiguous() for t in (x, scale, offset, gain, base)]
    x, scale, offset, gain, base = fp32
    out = in_large_pages(len(x), len(gain), dtype=torch.float32)
    room = in_large_pages(min(len(x), STATES), len(gain), dtype=torch.float32)
    for some, of_some, scores in zip(*(t.split(STATES) for t in (x, base, out)), strict=True):
        call(
            load("transform_coded", instructions).transform_coded_scores,
            *(tiles.codes, tiles.tiers, len(tiles.tiers)),
            *(tiles.planes, len(tiles.planes), tiles.columns, some, some.shape[1], len(some)),
            *(scale, offset, gain, places, of_some, len(gain), room, scores),
        )
    return out
