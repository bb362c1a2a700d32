"""Rounding a matrix to a grid so that its products with hidden states change least."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def round_through(latent: Tensor, last: Tensor | float) -> Tensor:
    """The nearest integer in `0 … last` of every number; its gradient is passed on to the number as it is.

    The straight-through estimator (Bengio et al., arXiv 1308.3432), but for what would only push a number further out
    of the range, whose gradient is 0.
    """
    rounded: Tensor = _RoundThrough.apply(latent, torch.as_tensor(last, device=latent.device))
    return rounded


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, last: Tensor) -> Tensor:
        ctx.save_for_backward(latent, last)
        return latent.round().clamp_min_(0).minimum(last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        latent, last = ctx.saved_tensors
        outwards = ((latent < 0) & (grad > 0)) | ((latent > last) & (grad < 0))
        return grad.masked_fill(outwards, 0), None


def nearest_code(
    values: Tensor,
    step: Tensor,
    offset: Tensor,
    last: Tensor | float,
    levels: Tensor | None = None,
) -> Tensor:
    """Code in `0 … last` of the grid point `offset + step · code` nearest to each value.

    With rising `levels (last + 1,)` the grid points are `offset + step · levels[code]`.
    """
    places = (values - offset) / step
    if levels is not None:
        return torch.bucketize(places, (levels[1:] + levels[:-1]) / 2).to(values.dtype)
    codes = places.round_().clamp_min_(0)
    return codes.clamp_max_(last) if isinstance(last, float) else codes.minimum(last)


def round_with_feedback(
    values: Tensor,
    step: Tensor,
    offset: Tensor,
    last: Tensor,
    moment: Tensor,
    order: Tensor,
    block: int = 64,
    levels: Tensor | None = None,
) -> Tensor:
    """Codes `(R, K)` uint8 that nearly minimise `(v̂ - v) moment (v̂ - v)ᵀ` of every row, `v̂ = offset + step · code`.

    Columns are rounded one by one in `order`; the error of each is passed on to those that follow, as far as these
    can undo it (GPTQ, arXiv 2210.17323). Then each in turn takes its best code beside all the others
    (`coordinate_descent`), which those before could not know.

    Args:
        values: `(R, K)` fp32.
        step, offset: broadcastable to `values`; last: `(K,)`, the largest code of each column.
        moment: `(K, K)`, positive definite.
        levels: of a grid that is not even, as in `nearest_code`.
    """
    upper = torch.linalg.cholesky(torch.linalg.inv(moment[order][:, order].double()), upper=True)
    upper = upper.float()  # moment⁻¹ = Uᵀ U
    rest = values[:, order]
    steps, offsets = (t.expand_as(values)[:, order] for t in (step, offset))
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=values.device)
    for first in range(0, len(order), block):
        stop = min(first + block, len(order))
        errors = torch.empty(len(rest), stop - first, device=values.device)
        for i in range(first, stop):
            code = nearest_code(rest[:, i], steps[:, i], offsets[:, i], last[order[i]], levels)
            codes[:, order[i]] = code.to(torch.uint8)
            level = code if levels is None else levels[code.long()]
            error = (rest[:, i] - offsets[:, i] - steps[:, i] * level) / upper[i, i]
            errors[:, i - first] = error
            rest[:, i:stop] -= error[:, None] * upper[i, i:stop]
        rest[:, stop:] -= errors @ upper[first:stop, stop:]
    del rest, errors
    return coordinate_descent(codes, values, step, offset, last, moment, order, levels=levels)


def coordinate_descent(
    codes: Tensor,
    values: Tensor,
    step: Tensor,
    offset: Tensor,
    last: Tensor,
    moment: Tensor,
    order: Tensor,
    *,
    levels: Tensor | None = None,
    sweeps: int = 2,
    block: int = 64,
) -> Tensor:
    """Codes `(R, K)` uint8 whose `(v̂ - v) moment (v̂ - v)ᵀ` is less, in no row more: see `round_with_feedback`.

    One column after the other, in `order`, takes the code that is best as all the others are (QuantEase,
    arXiv 2309.01885), `sweeps` times. Columns are handled as rows, which are contiguous.
    """
    metric = moment[order][:, order].float()
    step, offset = (t.expand_as(values).T[order] for t in (step, offset))
    wanted, codes, last = values.T[order], codes.T[order], last[order]

    def grid(code: Tensor, i: slice | int) -> Tensor:
        return offset[i] + step[i] * (code if levels is None else levels[code.long()])

    error = grid(codes, slice(None)) - wanted
    slope = metric @ error
    for _ in range(sweeps):
        for first in range(0, len(order), block):
            mine = slice(first, min(first + block, len(order)))
            near, here = metric[mine, mine], slope[mine]
            moved = torch.zeros_like(here)
            for i in range(len(here)):
                at = first + i
                best = wanted[at] + error[at] - (here[i] + near[i] @ moved) / near[i, i]
                code = nearest_code(best, step[at], offset[at], last[at], levels)
                codes[at] = code.to(torch.uint8)
                moved[i] = grid(code, at) - wanted[at] - error[at]
                error[at] += moved[i]
            slope += metric[:, mine] @ moved
    found = torch.empty_like(codes)
    found[order] = codes
    return found.T.contiguous()
