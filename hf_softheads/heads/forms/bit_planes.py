"""Codes of a different number of bits in every column: where they lie, and reading them while tracing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.bitpack import PARTS
from hf_softheads.kernels.transform_coded import Plane

_AMOUNTS, _MOST = max(PARTS) + 1, max(map(len, PARTS.values()))
_WIDTHS = [[*PARTS.get(amount, ()), 0, 0, 0][:_MOST] for amount in range(_AMOUNTS)]


def planes_of(bits: Tensor, ranges: Sequence[tuple[int, int]]) -> list[list[Plane]]:
    """Where the codes of each tier of rows `ranges` lie, by `bits (T, K)`.

    Tier by tier, for each number of bits, the bit planes of its columns as `PARTS` cuts them, column by column.
    """
    layout, start = [], 0
    for own, (first, last) in zip(bits.cpu(), ranges, strict=True):
        planes = []
        for amount, parts in PARTS.items():
            columns = (own == amount).nonzero().flatten().to(bits.device)
            below = amount
            for width in parts if len(columns) else ():
                below -= width
                stop = start + len(columns) * -(-(last - first) * width // 8)
                planes.append(Plane(columns, width, below, start, stop))
                start = stop
        layout.append(planes)
    return layout


def read_codes(
    packed: Tensor,
    bits: Tensor,
    ranges: Sequence[tuple[int, int]],
    which: Tensor,
    tier: Tensor | int,
) -> Tensor:
    """Codes of rows `which (n,)` in their `tier (n,)`, `(n, K)` fp32, from the layout of `planes_of`.

    By operations whose shapes do not depend on the bits: for tracing, where there are none to look at.
    """
    amount = bits.long()
    codes = torch.zeros(len(which), bits.shape[1], device=packed.device)
    if not len(packed):
        return codes
    width = torch.tensor(_WIDTHS, device=packed.device)  # (amounts, planes)
    below = width.flip(1).cumsum(1).flip(1) - width
    first, last = torch.tensor(ranges, device=packed.device).T
    stride = -(-(last - first)[:, None, None] * width // 8)  # of a column, (T, amounts, planes)
    same = F.one_hot(amount, _AMOUNTS)
    size = same.sum(1).unsqueeze(-1) * stride
    start = (size.flatten().cumsum(0) - size.flatten()).view_as(size)
    rank = same.cumsum(1).gather(2, amount.unsqueeze(-1)) - 1  # among the columns of as many bits
    tiers = torch.arange(len(bits), device=packed.device).unsqueeze(-1)
    column = start[tiers, amount] + rank * stride[tiers, amount]  # (T, K, planes)
    row = (which - first[tier]).unsqueeze(-1)
    for plane in range(_MOST):
        wide = width[amount, plane][tier]
        place = column[..., plane][tier] + row * wide // 8
        value = packed[place.clamp_max(len(packed) - 1)].int() >> (row * wide % 8)
        codes = codes + (value & (2**wide - 1)) * 2 ** below[amount, plane][tier]
    return codes
