"""Coded rows as numbers again, for matrix products with many hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_softheads.kernels import call, load
from hf_softheads.kernels.transform_coded import Plane


def quantized_rows(
    packed: Sequence[Tensor],
    widths: Sequence[int],
    scale: Tensor,
    first: int,
    out: Tensor,
    *,
    middle: float | None = None,
    instructions: str = "native",
) -> Tensor:
    """`out[v - first] = scale_vg (q_vj - middle)`: rows from `first` on, as many as `out (n, D)` has.

    Args:
        packed, widths, scale, middle: as of `quantized_scores`; out: fp32 or bf16.
    """
    rows, dim = out.shape
    if middle is None:
        middle = (2.0 ** sum(widths) - 1) / 2
    call(
        load("rows", instructions).quantized_rows,
        *(packed, widths, len(packed), float(middle), scale),
        *(dim // scale.shape[1], dim, first, rows, out, int(out.dtype == torch.bfloat16)),
    )
    return out


class Pieces(NamedTuple):
    """Where the bits of each column of a transform coded head are, and the gains of its rows."""

    bits: Tensor  # (T, K, 3, 2) int64: width, where in the codes; the highest bits first
    gain: Tensor  # (V + a vector,) fp32

    @classmethod
    def of(
        cls,
        ranges: Sequence[tuple[int, int]],
        planes: Sequence[Sequence[Plane]],
        gain: Tensor,
        dim: int,
    ) -> Pieces:
        bits = torch.zeros(len(ranges), dim, 3, 2, dtype=torch.long)
        for (start, stop), own, tier in zip(ranges, planes, bits, strict=True):
            for plane in own:
                size = -(-(stop - start) * plane.width // 8)
                where = plane.start + size * torch.arange(len(plane.columns))
                place = (tier[plane.columns, :, 0] > 0).sum(1)
                tier[plane.columns, place, 0], tier[plane.columns, place, 1] = plane.width, where
        return cls(bits, pad(gain, (0, 16)))


def transform_coded_rows(
    codes: Tensor,
    pieces: Pieces,
    scale: Tensor,
    offset: Tensor,
    spans: Tensor,
    out: Tensor,
    *,
    instructions: str = "native",
) -> Tensor:
    """`out[:, i] = gain_v (scale_tj q_vj + offset_tj)`, i through the rows v of the spans, t their tiers.

    Args:
        scale, offset: `(T, K)` fp32, contiguous.
        spans: `(S, 4)` int64, contiguous: tier, first row in the tier, rows, first row in all tiers.
        out: `(K, n)`, fp32 or bf16, its last axis without gaps.
    """
    call(
        load("rows", instructions).transform_coded_rows,
        *(codes, pieces.bits, scale, offset, pieces.gain, len(out), spans, len(spans)),
        *(out, out.stride(0), int(out.dtype == torch.bfloat16)),
    )
    return out


def product_vq_rows(
    packed: Sequence[Tensor],
    widths: Sequence[int],
    books: Tensor,
    first: int,
    out: Tensor,
    *,
    instructions: str = "native",
) -> Tensor:
    """`out[v - first] = books[g, code_vg]`, g by g: rows from `first` on, as many as `out (n, D)` has.

    Args:
        packed: what `pack_bits` made of the codes `(V, G)`, contiguous; widths: `PARTS[bits]`.
        books: `(G, C, d)`, contiguous, of the dtype of `out`.
    """
    groups, codes, width = books.shape
    call(
        load("rows", instructions).product_vq_rows,
        *(packed, widths, len(packed), books, groups, codes, width * books.element_size()),
        *(first, len(out), out),
    )
    return out


def in_order(
    scores: Tensor, places: Tensor, base: Tensor, out: Tensor, *, instructions: str = "native"
) -> Tensor:
    """`out[:, v] = scores[:, places[v]] + base`, `(B, n)`: scores fp32 or bf16, base `(B,)` fp32, both contiguous.

    places: `(n,)` int32; out: fp32, its last axis without gaps.
    """
    half = int(scores.dtype == torch.bfloat16)
    function = load("rows", instructions).in_order
    call(function, scores, half, *scores.shape, places, base, out, out.stride(0))
    return out
