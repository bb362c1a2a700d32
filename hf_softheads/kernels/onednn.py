"""Products with rows of integer codes by the product of bytes that torch's oneDNN brings: no compiler is needed.

Hidden states are rounded to 15 bits and cut into two halves of 8, which are two rows of one matrix product: exact in
integers, as in `integers.hpp`, and so nearer to fp32 than a bf16 product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hf_softheads.kernels import STATES, constant, in_large_pages

_ROWS = 2**15  # multiplied at once: the products of both halves stay in the cache


def int8_packed(codes: Callable[[slice], Tensor], vocab: int, bits: int) -> list[Tensor]:
    """Codes of `bits` bits, a byte each, in the order in which oneDNN reads them: opaque copies of `_ROWS` rows each.

    `codes` gives some of the rows, `(n, D)` uint8.
    """
    packed = []
    for start in range(0, vocab, _ROWS):
        rows = codes(slice(start, min(start + _ROWS, vocab)))
        signed = (rows - 2 ** (bits - 1)).view(torch.int8)
        packed.append(torch.ops.onednn.qlinear_prepack(signed, [1, rows.shape[1]]))
    return packed


def int8_scores(
    hidden: Tensor, packed: list[Tensor], scale: Tensor, *, integers: bool = False
) -> Tensor:
    """`scale_v Σ_j (q_vj - m) h_j`, `(B, V)` fp32; `m = (2**bits - 1) / 2`, with `integers` `2**(bits - 1)`.

    Args:
        hidden: `(B, D)` on the CPU; packed: what `int8_packed` made of q; scale: `(V,)` fp32.
    """
    scores = in_large_pages(len(hidden), len(scale), dtype=torch.float32)
    for states, out in zip(hidden.split(STATES), scores.split(STATES), strict=True):
        _score(states.float(), packed, scale, out, 0.0 if integers else 0.5)
    return scores


def _score(
    states: Tensor, packed: list[Tensor], scale: Tensor, scores: Tensor, less: float
) -> None:
    step = states.abs().amax(1, keepdim=True).clamp_min(1e-30) / 16256
    rounded = (states / step).round_().int()
    high = (rounded + 64) >> 7
    halves = torch.cat([high, rounded - 128 * high]).add_(128).to(torch.uint8)  # from 1 to 255
    half = rounded.sum(1) * less  # 127.5 = 128 - 1/2, and so on
    parts = zip(packed, scale.split(_ROWS), scores.split(_ROWS, 1), strict=True)
    for rows, sizes, out in parts:
        upper, lower = _product(halves, rows, sizes).chunk(2)
        torch.mul(lower.add_(upper, alpha=128).addr_(half, sizes), step, out=out)


def _product(states: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    found: Tensor = torch.ops.onednn.qlinear_pointwise(
        states, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found


@constant
def why_no_int8() -> str | None:
    """Why `int8_scores` cannot be used here, or is not exact or not fast; none if it can."""
    return _why_no_int8()


@functools.cache
def _why_no_int8() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    # Without these instructions sums of two products overflow 16 bits.
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "this processor has no integer products (VNNI)"
    codes = torch.tensor([0, 255, 128, 1], dtype=torch.uint8).repeat_interleave(4).repeat(5, 16)
    codes[1], codes[2] = 255, 0  # the largest sums there can be
    halves = torch.tensor([[-127, 127, 127, -127]]).repeat(2, 64)
    halves[1] = -127
    try:
        (packed,) = int8_packed(codes.__getitem__, 5, 8)
        found = _product((halves + 128).to(torch.uint8), packed, torch.ones(5))
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this torch has another integer product: {str(error).splitlines()[0]}"
    if not torch.equal(found, (halves @ (codes.long() - 128).T).float()):
        return "torch's integer product is not exact on this processor"
    return None
