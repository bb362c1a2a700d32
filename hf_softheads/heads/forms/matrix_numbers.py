"""Numbers per token of a dense matrix, walked over in blocks of the vocabulary; the backward pass walks again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_softheads.heads.forms.logit_transform import LogitTransform

_COLUMNS = 512  # of a block, at least: narrower matrix products waste the machine


class Walk(NamedTuple):
    """How to go over the logits `transform(F.linear(hidden, weight, bias)) / temperature`."""

    transform: LogitTransform
    temperature: float
    moments: bool
    elements: int  # of one block

    def blocks(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor]]:
        width = max(_COLUMNS, self.elements // max(1, len(hidden)))
        for start in range(0, len(weight), width):
            stop = min(start + width, len(weight))
            shift = None if bias is None else bias[start:stop].to(hidden.dtype)
            yield start, stop, F.linear(hidden, weight[start:stop].to(hidden.dtype), shift)

    def logits(self, scores: Tensor) -> Tensor:
        return self.transform(scores) / self.temperature


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
        for start, stop, scores in walk.blocks(hidden, weight, bias):
            rows, columns = _here(labels, start, stop)
            target[rows] = walk.logits(scores[rows, columns].float())
            for t in _tiles(scores):
                z = walk.logits(scores[t].float())
                high, where = z.max(-1)
                best[t] = torch.where(high > top[t], where + start, best[t])
                new = torch.maximum(top[t], high)
                fall = (top[t] - new).clamp_min(-1e30)  # the first block falls from -inf
                shrink = fall.exp()
                if walk.moments:
                    plain[t] += z.sum(-1)
                z = z.sub_(new.unsqueeze(-1)).clamp_min_(-1e30)
                e = z.exp()
                # Σ e and Σ e·(z − top), moved to the new maximum: no difference of large numbers
                spread[t] = shrink * (spread[t] + fall * total[t]) + (e * z).sum(-1)
                total[t] = shrink * total[t] + e.sum(-1)
                if walk.moments:
                    twice[t] = shrink.square() * twice[t] + e.square_().sum(-1)
                top[t] = new
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
        for start, stop, scores in walk.blocks(hidden, weight, bias):
            for t in _tiles(scores):
                slope = grad[t, 0].unsqueeze(-1), grad[t, 1].unsqueeze(-1)
                place = _here(labels[t], start, stop)
                numbers = logsumexp[t].unsqueeze(-1), entropy[t].unsqueeze(-1)
                scores[t] = _gradient(scores[t].float(), walk, numbers, slope, place)
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
    walk: Walk,
    numbers: tuple[Tensor, Tensor],
    slope: tuple[Tensor, Tensor],
    place: tuple[Tensor, Tensor],
) -> Tensor:
    """With respect to a tile of scores: `∂ log p_y = 1[y] − p`, `∂ H = −p (log p + H)`, through the transform."""
    log_p = walk.logits(scores).sub_(numbers[0]).clamp_min_(-1e30)
    p = log_p.exp()
    g = log_p.add_(numbers[1]).mul_(slope[1]).add_(slope[0]).mul_(p).neg_()
    rows, columns = place
    g[rows, columns] += slope[0][rows, 0]
    if walk.transform.scale is not None:
        return g.mul_(walk.transform.scale / walk.temperature)
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        (found,) = torch.autograd.grad(walk.logits(leaf), leaf, g)
    return found


def _here(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows whose label is in `[start, stop)`, and its place there."""
    rows = ((labels >= start) & (labels < stop)).nonzero().squeeze(-1)
    return rows, labels[rows] - start


def _tiles(scores: Tensor) -> Iterator[slice]:
    """Rows of a block whose element-wise work stays in a CPU's cache."""
    n, width = scores.shape
    rows = max(1, (2**17 if scores.device.type == "cpu" else 2**25) // width)
    return (slice(i, min(i + rows, n)) for i in range(0, n, rows))
