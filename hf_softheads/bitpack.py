"""Small unsigned integers packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

PARTS: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip
"""Widths, each a divisor of 8, into which a number of so many bits is cut, highest bits first."""


def pack(values: Tensor, width: int) -> Tensor:
    """`(R, N)` integers below `2**width` to `(R, ⌈N width / 8⌉)` bytes; value j of a byte in bits `j·width …`."""
    per_byte = 8 // width
    padded = torch.nn.functional.pad(values.to(torch.uint8), (0, -values.shape[1] % per_byte))
    cut: Tensor = padded.view(len(values), -1, per_byte)
    packed: Tensor = torch.zeros(cut.shape[:2], dtype=torch.uint8, device=values.device)
    for place in range(per_byte):
        packed |= cut[:, :, place] << (place * width)
    return packed


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """Inverse of `pack`: `(R, count)` uint8."""
    if width == 8:
        return packed[:, :count]
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    values: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**width - 1)
    return values.flatten(1)[:, :count]


def pack_bits(values: Tensor, bits: int) -> list[Tensor]:
    """`(R, N)` integers below `2**bits` as one packed tensor per entry of `PARTS[bits]`."""
    packed, below = [], bits
    for width in PARTS[bits]:
        below -= width
        packed.append(pack((values >> below) & (2**width - 1), width))
    return packed


def unpack_bits(packed: list[Tensor], bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: `(R, count)` uint8."""
    values = torch.zeros((), dtype=torch.uint8, device=packed[0].device)
    for part, width in zip(packed, PARTS[bits], strict=True):
        values = (values << width) | unpack(part, width, count)
    return values


def index_dtype(values: int) -> torch.dtype:
    """The smallest integer type that holds `0 … values - 1`; int32 from 32,769 on."""
    if values <= 2**8:
        return torch.uint8
    return torch.int16 if values <= 2**15 else torch.int32
