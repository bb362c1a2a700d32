"""Numbers per token of a dense matrix, walked over in blocks of the vocabulary; the backward pass walks again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_softheads.heads.forms.logit_transform import LogitTransform

_LEAST = (
    -87.0
)  # what a logit may lack to the largest: e to it is the smallest number that is not slow
_COLUMNS = 512  # of a block, at least: narrower matrix products waste the machine


class Walk(NamedTuple):
    """How to go over the logits `transform(F.linear(hidden, weight, bias)) / temperature`."""

    transform: LogitTransform
    temperature: float
    moments: bool
    elements: int  # of one block

    def blocks(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
        """Where each block begins and ends, its scores `(n, width)`, and room for as many numbers in fp32, twice.

        On a CPU fresh memory for these would cost more than what is done there.
        """
        width = min(len(weight), max(_COLUMNS, self.elements // max(1, len(hidden))))
        room = hidden.new_empty(2, len(hidden) * width, dtype=torch.float32)
        for start in range(0, len(weight), width):
            stop = min(start + width, len(weight))
            shift = None if bias is None else bias[start:stop].to(hidden.dtype)
            scores = F.linear(hidden, weight[start:stop].to(hidden.dtype), shift)
            first, second = (x[: scores.numel()].view_as(scores) for x in room)
            yield start, stop, scores, first, second

    def logits(self, scores: Tensor) -> Tensor:
        z = self.transform(scores)
        return z if self.temperature == 1 else z / self.temperature


def of_matrix(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, walk: Walk
) -> Tensor:
    """`of_logits` of a dense head: `hidden (n, D)`, `labels (n,)` → `(n, 3)`, or `(n, 5)` with moments, fp32.

    Gradients of the log-probability and the entropy reach the hidden states, the weight and the bias, with fp32 sums.
    """
    return _OfMatrix.apply(hidden, weight, bias, labels, walk)  # type: ignore[no-any-return]


class _OfMatrix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, walk: Walk
    ) -> Tensor:
        zero = hidden.new_zeros(len(hidden), dtype=torch.float32)
        top, best = torch.full_like(zero, -torch.inf), torch.zeros_like(labels)
        target, total, spread, plain, twice = (zero.clone() for _ in range(5))
        for start, stop, scores, z, e in walk.blocks(hidden, weight, bias):
            z = walk.logits(z.copy_(scores))
            rows, columns = _here(labels, start, stop)
            target[rows] = z[rows, columns]
            high = z.amax(-1)
            higher = (high > top).nonzero().squeeze(-1)  # few, after the first blocks
            if len(higher):
                best[higher] = z[higher].argmax(-1) + start
            new = torch.maximum(top, high)
            fall = (top - new).clamp_min_(_LEAST)  # the first block falls from -inf
            shrink, top = fall.exp(), new
            if walk.moments:
                plain += z.sum(-1)
            torch.exp(z.sub_(new.unsqueeze(-1)).clamp_min_(_LEAST), out=e)
            here = e.sum(-1)
            # Σ e and Σ e·(z − top), moved to the new maximum: no difference of large numbers
            spread = shrink * (spread + fall * total) + z.mul_(e).sum(-1)
            total = shrink * total + here
            if walk.moments:
                twice = shrink.square() * twice + e.square_().sum(-1)
        log_total = total.log()
        logsumexp, entropy = top + log_total, log_total - spread / total
        ctx.save_for_backward(hidden, weight, bias, labels, logsumexp, entropy)
        ctx.walk = walk
        found = [(target - top) - log_total, entropy, best.float()]
        if walk.moments:
            found += [plain / len(weight), twice.log() - 2 * log_total]
        return torch.stack(found, -1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, bias, labels, logsumexp, entropy = ctx.saved_tensors
        walk: Walk = ctx.walk
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if of_hidden else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        grad_bias = torch.empty_like(bias) if of_bias else None
        numbers = logsumexp.unsqueeze(-1), entropy.unsqueeze(-1)
        slope = grad[:, 0].unsqueeze(-1), grad[:, 1].unsqueeze(-1)
        for start, stop, scores, z, p in walk.blocks(hidden, weight, bias):
            place = _here(labels, start, stop)
            scores.copy_(_gradient(z.copy_(scores), p, walk, numbers, slope, place))
            if grad_hidden is not None:
                grad_hidden += scores @ weight[start:stop].to(scores.dtype)
            if grad_weight is not None:
                grad_weight[start:stop] = scores.T @ hidden
            if grad_bias is not None:
                grad_bias[start:stop] = scores.sum(0, dtype=torch.float32)
        found = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return found, grad_weight, grad_bias, None, None


def _gradient(
    scores: Tensor,
    p: Tensor,
    walk: Walk,
    numbers: tuple[Tensor, Tensor],
    slope: tuple[Tensor, Tensor],
    place: tuple[Tensor, Tensor],
) -> Tensor:
    """With respect to a block of scores: `∂ log p_y = 1[y] − p`, `∂ H = −p (log p + H)`, through the transform.

    The scores are overwritten, and `p`, which is as large.
    """
    log_p = walk.logits(scores).sub_(numbers[0]).clamp_min_(_LEAST)
    torch.exp(log_p, out=p)
    # −p (s₀ + s₁ (log p + H))
    g = torch.addcmul(-(slope[0] + slope[1] * numbers[1]), log_p, -slope[1], out=log_p).mul_(p)
    rows, columns = place
    g[rows, columns] += slope[0][rows, 0]
    if walk.transform.scale is not None:
        factor = walk.transform.scale / walk.temperature
        return g if factor == 1 else g.mul_(factor)
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        (found,) = torch.autograd.grad(walk.logits(leaf), leaf, g)
    return found


def _here(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows whose label is in `[start, stop)`, and its place there."""
    rows = ((labels >= start) & (labels < stop)).nonzero().squeeze(-1)
    return rows, labels[rows] - start
