"""A rotation that costs a sign per column: Hadamard transforms of blocks of columns after random signs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_softheads.compiling import constant


def signed_hadamard(values: Tensor, signs: Tensor) -> Tensor:
    """`H (signs ∘ v)` of `values (…, D)`: H is orthogonal and symmetric, blocks of the largest power of two in D.

    A block of `a b` columns is turned by two products, with matrices of a and of b rows: `H_ab = H_a ⊗ H_b`. Sums are
    in fp32 at least. `signs` is `(D,)` of ±1, any dtype.
    """
    first, second = factors(values.shape[-1])
    wide = values if values.dtype == torch.float64 else values.float()
    turned = (wide * signs.to(wide.dtype)).reshape(-1, first, second)
    for size in (
        second,
        first,
    ):  # plain matrix products: torch gives threads to batches, however small
        turned = (turned.reshape(-1, size) @ _hadamard(size).to(turned)).view(turned.shape).mT
    return turned.reshape(values.shape).to(values.dtype)


def factors(dim: int) -> tuple[int, int]:
    """The a and b of a block of `a b` columns, the largest power of two that divides `dim`."""
    bits = (dim & -dim).bit_length() - 1
    return 2 ** (bits // 2), 2 ** (bits - bits // 2)


def random_signs(dim: int, seed: int) -> Tensor:
    """`(dim,)` of ±1, int8."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(2, (dim,), generator=generator) * 2 - 1).to(torch.int8)


@constant
def _hadamard(size: int) -> Tensor:
    return _built(size)


@cache
def _built(size: int) -> Tensor:
    matrix: Tensor = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.mul(size**-0.5)
