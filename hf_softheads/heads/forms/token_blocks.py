"""Blocks of tokens of a head that keeps its rows in tiers, in a tier by rising token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def token_blocks(
    order: Tensor, places: Tensor, tiers: Tensor, ranges: Sequence[tuple[int, int]], size: int
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Tokens start … stop - 1 for each block of `size`, the spans of rows that are theirs, and their places in these.

    In a tier the rows of a block follow one another. A span is its tier, its first row in the tier, rows, and its first
    row, `(T, 4)` int64; a token's place is its row's among those of all spans, `(stop - start,)` int32.

    Args:
        order, places: token of each row, row of each token, `(V,)`; tiers: of each token, `(V,)` int32.
        ranges: rows of each tier.
    """
    starts = [*range(0, len(order), size), len(order)]
    limits = torch.tensor(starts)
    rows = torch.stack([torch.searchsorted(order[a:b], limits) + a for a, b in ranges])
    numbers, first = torch.arange(len(rows)), torch.tensor(ranges)[:, 0]
    for block, (start, stop) in enumerate(itertools.pairwise(starts)):
        begin, count = rows[:, block], rows[:, block + 1] - rows[:, block]
        spans = torch.stack([numbers, begin - first, count, begin], 1)
        ahead = (begin - count.cumsum(0) + count).int()  # of a row's number, to its place
        yield start, stop, spans, places[start:stop] - ahead[tiers[start:stop]]
