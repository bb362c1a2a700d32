"""How many bits each column of each tier of tokens gets: reverse water-filling."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from hf_softheads.bitpack import PARTS

# Error and step of the best uniform quantizer of a unit Gaussian with 0 … 8 bits (Max 1960).
_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 0.0000869)
STEP = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)


def water_fill(energy: Tensor, sizes: list[int], budget: int) -> Tensor:
    """Bits of each column of each tier, `(T, K)` uint8: always the bit that lowers the error most per byte."""
    values = energy.double().tolist()
    bits = [[0] * len(row) for row in values]
    heap: list[tuple[float, int, int]] = []

    def push(tier: int, column: int) -> None:
        had = bits[tier][column]
        if had < 8:
            gain = values[tier][column] * (_ERROR[had] - _ERROR[had + 1])
            heapq.heappush(heap, (-gain, tier, column))

    for tier, row in enumerate(values):
        for column in range(len(row)):
            push(tier, column)
    left = budget
    while heap:
        _, tier, column = heapq.heappop(heap)
        had, size = bits[tier][column], sizes[tier]
        cost = _column_bytes(had + 1, size) - _column_bytes(had, size)
        if cost > left:
            continue
        left -= cost
        bits[tier][column] += 1
        push(tier, column)
    return torch.tensor(bits, dtype=torch.uint8)


def _column_bytes(bits: int, rows: int) -> int:
    return sum(-(-rows * width // 8) for width in PARTS[bits]) if bits else 0
