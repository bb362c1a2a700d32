"""Scores of a product_vq head by tables of sums, from codes brought once into the order the kernel reads."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from hf_softheads.bitpack import pack
from hf_softheads.kernels import in_large_pages, load

_TILE = 512  # tokens, as in product_vq.cpp


def make_tiles(codes: Tensor, n_codes: int) -> Tensor:
    """Codes `(V, G)` uint8 as the kernel reads them: a byte each, half a byte each for up to 16 codes."""
    if n_codes <= 16:
        codes = pack(codes, 4)
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % _TILE))
    return in_large_pages(filled.view(-1, _TILE, codes.shape[1]).transpose(1, 2))


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
    out = torch.empty(len(x), vocab)
    load("product_vq", instructions).product_vq_scores(
        ctypes.c_void_p(tiles.data_ptr()),
        ctypes.c_int64(vocab),
        ctypes.c_void_p(books.data_ptr()),
        ctypes.c_int64(groups),
        ctypes.c_int64(codes),
        ctypes.c_int64(width),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_int64(len(x)),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return out
