"""Scores of a product_vq head by tables of sums, from codes brought once into the order the kernel reads."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.bitpack import pack
from hf_softheads.kernels import STATES, call, in_large_pages, load

_TILE = 512  # tokens, as in product_vq.cpp


def make_tiles(codes: Tensor, n_codes: int) -> Tensor:
    """Codes `(V, G)` uint8 as the kernel reads them: a byte each, half a byte each for up to 16 codes."""
    if n_codes <= 16:
        codes = pack(codes, 4)
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % _TILE))
    tiles = filled.view(-1, _TILE, codes.shape[1]).transpose(1, 2)
    return in_large_pages(*tiles.shape, dtype=torch.uint8).copy_(tiles)


def product_vq_scores(
    x: Tensor, tiles: Tensor, books: Tensor, vocab: int, *, instructions: str = "native"
) -> Tensor:
    """`Σ_g table[g, code_vg]`, `table[g, c] = Σ_d books[g, d, c] x_gd` rounded to 8 bits, `(B, V)` fp32.

    Args:
        x: `(B, G · d)` fp32; tiles: what `make_tiles` gives.
        books: `(G, d, C)` fp32, contiguous.
    """
    x = x.contiguous()
    groups, width, codes = books.shape
    out = in_large_pages(len(x), vocab, dtype=torch.float32)
    function = load("product_vq", instructions).product_vq_scores
    for some, scores in zip(x.split(STATES), out.split(STATES), strict=True):
        call(function, tiles, vocab, books, groups, codes, width, some, len(some), scores)
    return out
