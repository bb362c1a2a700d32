"""Tokens in the order of the leaves of a binary tree, so that neighbours are alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.fit.blockwise import blocks, progress

BLOCK = 4096  # rows, of as many whole segments, that are split together
_POWER_STEPS = 8  # towards the direction in which a node's tokens differ most


def bisected(rows: Tensor) -> Tensor:
    """Tokens in the order of the leaves `V … 2V - 1`: each node's tokens are split where their rows differ most."""
    vocab = len(rows)
    levels = vocab.bit_length() - 1  # nodes 2^levels … are the last full level
    deep = vocab - 2**levels  # of which so many, from the left, are nodes with two leaves
    order = torch.arange(vocab, device=rows.device)
    for level in progress(range(levels), "tree"):
        edges = torch.arange(2**level + 1) * 2 ** (levels - level)
        edges = edges + edges.clamp_max(deep)
        size = max(1, BLOCK >> (levels - level))
        for first in range(0, 2**level, size):
            some = edges[first : first + size + 1].to(rows.device)
            here = slice(int(some[0]), int(some[-1]))
            order[here] = order[here][_split(rows, order[here], some.diff())]
    # the two-leaf nodes lie left in the tree, their leaves are numbered last
    return order.roll(-2 * deep)


def _split(rows: Tensor, order: Tensor, sizes: Tensor) -> Tensor:
    """Places of the rows `order` that sort each segment of so many along its direction of largest variance."""
    segment = torch.arange(len(sizes), device=rows.device).repeat_interleave(sizes)

    def sums(function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        total = torch.zeros(len(sizes), rows.shape[1], device=rows.device)
        for part in blocks(len(order)):
            own = function(rows[order[part]].float(), part)
            total.index_add_(0, segment[part], own)
        return total

    mean = sums(lambda own, _: own) / sizes[:, None]
    direction = torch.randn(mean.shape[1], generator=torch.Generator().manual_seed(0)).to(mean)
    direction = direction.expand_as(mean)
    along = torch.empty(len(order), device=rows.device)

    def weighted(own: Tensor, part: slice) -> Tensor:
        own = own - mean[segment[part]]
        along[part] = (own * direction[segment[part]]).sum(-1)
        return own.mul_(along[part, None])

    for _ in range(_POWER_STEPS):
        direction = F.normalize(sums(weighted), dim=-1)
    sums(weighted)
    inside = along.argsort(stable=True)
    return inside[segment[inside].argsort(stable=True)]
