"""α-entmax over the rows of a matrix: find the threshold τ, then `relu((α - 1) z - τ)^(1 / (α - 1))`."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.attention.base import lowered

_STEPS = 30  # Newton needs 4-12; a row map that is not convex (α > 2) is bisected


def entmax(scores: Tensor, keep: Tensor, alpha: float | Tensor) -> Tensor:
    """α-entmax over the kept keys, 0 elsewhere, also in rows that keep nothing; differentiable in scores and α.

    τ is found without gradients and then moved by one Newton step with them. The step's value is about 0 and its
    derivative is that of the implicit function τ(z, α), so plain autograd gives the exact gradient.

    Args:
        scores: `(…, K)`.
        keep: bool, broadcastable to scores.
        alpha: α > 1, a number or a tensor that broadcasts to `(…, 1)`.
    """
    x = lowered((alpha - 1) * scores, keep)
    top = x.detach().amax(-1, keepdim=True)
    alive = top > torch.finfo(x.dtype).min / 2
    x = x - top  # τ lies in [-1, 0)
    power = 1 / (alpha - 1)
    with torch.no_grad():
        tau = _bisect(x, power) if _above_two(alpha) else _newton(x, power)
    if torch.is_grad_enabled() and (scores.requires_grad or isinstance(alpha, Tensor)):
        above = (x - tau).relu()
        inside = above > 0
        safe = above.masked_fill(~inside, 1)  # 0 ** negative is inf, and its gradient NaN
        slope = (power * safe.detach() ** (power - 1) * inside).sum(-1, keepdim=True)
        excess = (safe**power * inside).sum(-1, keepdim=True) - 1
        tau = tau + (excess / slope.detach().masked_fill(slope == 0, 1))
        above = (x - tau).relu()
        inside = above > 0
        safe = above.masked_fill(~inside, 1)
        return (safe**power) * (inside & alive)
    above = (x - tau).relu_()
    return _power(above, power).mul_(alive)


def entmax_grad(weights: Tensor, grad: Tensor, alpha: float) -> Tensor:
    """Gradient of the scores: `s · (g - Σ s g / Σ s)` with `s = w^(2 - α)` on the support."""
    if alpha == 2:
        s = (weights > 0).to(weights.dtype)
    else:
        s = weights.sqrt() if alpha == 1.5 else weights ** (2 - alpha)
        if alpha > 2:
            s = s.masked_fill(weights == 0, 0)
    total = s.sum(-1, keepdim=True)
    mean = (s * grad).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
    return (grad - mean).mul_(s)


def _newton(x: Tensor, power: float | Tensor) -> Tensor:
    """`Σ relu(x - τ)^power = 1`; convex and falling in τ, so that Newton rises to the root from τ = max - 1."""
    tau = torch.full_like(x[..., :1], -1.0)
    tolerance = 4 * torch.finfo(x.dtype).eps
    for _ in range(_STEPS):
        above = (x - tau).relu_()
        total, slope = _sums(above, power)
        step = (total - 1) / slope.clamp(min=torch.finfo(x.dtype).tiny)
        tau = tau + step.clamp(min=0)
        if not torch.compiler.is_compiling() and bool((step <= tolerance).all()):
            break
    return tau.clamp(max=-torch.finfo(x.dtype).eps)


def _sums(above: Tensor, power: float | Tensor) -> tuple[Tensor, Tensor]:
    """`Σ above^power` and minus its derivative in τ."""
    if isinstance(power, float) and power == 1.0:
        return above.sum(-1, keepdim=True), above.sign().sum(-1, keepdim=True)
    if isinstance(power, float) and power == 2.0:
        squares = torch.linalg.vecdot(above, above).unsqueeze(-1)
        return squares, 2 * above.sum(-1, keepdim=True)
    lower = (above ** (power - 1)).masked_fill_(above == 0, 0)
    return (lower * above).sum(-1, keepdim=True), (power * lower).sum(-1, keepdim=True)


def _bisect(x: Tensor, power: float | Tensor) -> Tensor:
    low = torch.full_like(x[..., :1], -1.0)
    high = torch.zeros_like(low)
    for _ in range(60 if x.dtype == torch.float64 else 30):
        middle = (low + high) / 2
        enough = _power((x - middle).relu_(), power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _power(above: Tensor, power: float | Tensor) -> Tensor:
    """`above^power`, with 0 for 0."""
    if isinstance(power, float) and power in (1.0, 2.0):
        return above if power == 1.0 else above * above
    return above**power


def _above_two(alpha: float | Tensor) -> bool:
    return not isinstance(alpha, Tensor) and alpha > 2  # a learned α stays below 2
