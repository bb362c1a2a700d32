"""Losses that need a few numbers per token: a dense head's vocabulary in blocks, gradients in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_softheads.losses.base import LogitStatistic
from hf_softheads.training.token_chunks import PrecomputedGrad, Scorer, tiles, widened

COLUMNS = 64  # of a block, at least: narrower matrix products waste the machine
_LOG2_E = 1.4426950408889634

Spans = list[tuple[int, int]]


def blocks(
    hidden: Tensor,
    labels: Tensor,
    head: Scorer,
    needs: frozenset[LogitStatistic],
    combine: Callable[[dict[LogitStatistic, Tensor]], Tensor],
    *,
    elements: int,
    memory: int,
) -> Tensor:
    """The scalar `combine(numbers)` of a dense head's logits, `elements` of them in a block.

    `hidden (n, D)`, `labels (n,)` in `[0, V)`; `combine` maps the numbers in `needs`, each `(n,)`, to a scalar.
    The walk over the vocabulary finds the numbers, autograd of `combine` their gradients; then every block carries
    these to hidden states, weight and bias: `∂/∂z = a·p + b·1[y] + c/V + 2d·z/V`. Blocks of at most `memory` bytes are
    kept in between, in the dtype of the hidden states; the others are computed a second time.
    """
    vocab, n = len(head.weight), max(len(hidden), 1)
    width = max(min(COLUMNS, vocab), elements // n)
    spans = [(i, min(i + width, vocab)) for i in range(0, vocab, width)]
    wanted = torch.is_grad_enabled()

    def compute() -> tuple[Tensor, list[Tensor | None]]:
        x = hidden.detach()
        walk = _Walk(x, head, spans, memory if wanted else 0)
        found = _numbers(walk, labels, needs)
        leaves = {k: v.requires_grad_() for k, v in found.items()}
        with torch.enable_grad():
            total = combine(_derived(leaves, needs))
        if not wanted:
            return total.detach(), []
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        slope = {k: s for k, s in zip(leaves, slopes, strict=True) if s is not None}
        return total.detach(), _carry_back(walk, labels, leaves, slope, hidden.requires_grad)

    if not wanted:
        return compute()[0]
    return PrecomputedGrad.apply(compute, hidden, head.weight, head.bias)  # type: ignore[no-any-return]


class _Walk:
    """The blocks of scores `(n, width)` in order, for the first time and again."""

    def __init__(self, hidden: Tensor, head: Scorer, spans: Spans, memory: int):
        self.hidden, self.head, self.spans, self.memory = hidden, head, spans, memory
        self._kept: dict[int, Tensor] = {}

    def first(self) -> Iterator[tuple[int, int, Tensor]]:
        free = self.memory
        for start, stop in self.spans:
            scores = self.head.block(self.hidden, start, stop)
            free -= scores.nbytes
            if free >= 0:
                self._kept[start] = scores
            yield start, stop, scores

    def again(self) -> Iterator[tuple[int, int, Tensor]]:
        """The caller may overwrite what it gets."""
        for start, stop in self.spans:
            kept = self._kept.pop(start, None)
            yield start, stop, self.head.block(self.hidden, start, stop) if kept is None else kept
            del kept  # given back while the gradient of the weight grows


def _numbers(
    walk: _Walk, labels: Tensor, needs: frozenset[LogitStatistic]
) -> dict[LogitStatistic, Tensor]:
    """The independent numbers behind `needs`, in one walk."""
    head, vocab = walk.head, len(walk.head.weight)
    zero = widened(walk.hidden.new_zeros(len(walk.hidden)))
    log_prob = "log_prob" in needs
    found: dict[LogitStatistic, Tensor] = {}
    if log_prob or "logsumexp" in needs:
        found["logsumexp"] = torch.full_like(zero, -torch.inf)
    if log_prob or "target" in needs:
        found["target"] = zero.clone()
    if "mean" in needs:
        found["mean"] = zero.clone()
    if "mean_square" in needs:
        found["mean_square"] = zero.clone()
    for start, stop, scores in walk.first():
        if "target" in found:
            rows, columns = _here(labels, start, stop)
            found["target"][rows] = head.transform(widened(scores[rows, columns]))
        for part in tiles(scores):
            z = head.transform(widened(scores[part]))
            if "mean" in found:
                found["mean"][part] += z.sum(-1) / vocab
            if "mean_square" in found:
                found["mean_square"][part] += z.square().sum(-1) / vocab
            if "logsumexp" in found:
                top = z.amax(-1, keepdim=True)
                here = _exp_(z - top).sum(-1).log_() + top.squeeze(-1)
                found["logsumexp"][part] = torch.logaddexp(found["logsumexp"][part], here)
    return found


def _derived(
    leaves: dict[LogitStatistic, Tensor], needs: frozenset[LogitStatistic]
) -> dict[LogitStatistic, Tensor]:
    if "log_prob" in needs:
        return {**leaves, "log_prob": leaves["target"] - leaves["logsumexp"]}
    return leaves


def _carry_back(
    walk: _Walk,
    labels: Tensor,
    numbers: dict[LogitStatistic, Tensor],
    slope: dict[LogitStatistic, Tensor],
    trains_body: bool,
) -> list[Tensor | None]:
    hidden, head = walk.hidden, walk.head
    weight, bias = head.weight, head.bias
    grad_hidden = widened(torch.zeros_like(hidden)) if trains_body else None
    grad_weight = torch.empty_like(weight) if weight.requires_grad else None
    grad_bias = widened(torch.zeros_like(bias)) if bias is not None and bias.requires_grad else None
    for start, stop, scores in walk.again():
        for part in tiles(scores):
            here = {k: (numbers[k].detach()[part], s[part]) for k, s in slope.items()}
            g = _gradient(scores[part], labels[part], head, here, start, stop)
            if grad_bias is not None:
                grad_bias[start:stop] += g.sum(0)
            scores[part] = g
        if grad_hidden is not None:
            grad_hidden += scores @ weight[start:stop].to(scores.dtype)
        if grad_weight is not None:
            grad_weight[start:stop] = scores.T @ hidden.to(scores.dtype)
    return [grad_hidden, grad_weight, grad_bias]


def _gradient(
    scores: Tensor,
    labels: Tensor,
    head: Scorer,
    slope: dict[LogitStatistic, tuple[Tensor, Tensor]],
    start: int,
    stop: int,
) -> Tensor:
    """Of the total with respect to a tile of scores; `slope` has the numbers and their gradients."""
    vocab, scale = len(head.weight), head.transform.scale
    s = widened(scores)
    z = head.transform(s)
    rest = None  # what does not go through the softmax
    if "mean_square" in slope:
        rest = z * (2 * slope["mean_square"][1] / vocab).unsqueeze(-1)
    if "mean" in slope:
        mean = (slope["mean"][1] / vocab).unsqueeze(-1)
        rest = mean.expand_as(z).clone() if rest is None else rest.add_(mean)
    if "logsumexp" in slope:
        total, factor = slope["logsumexp"]
        p = _exp_(z - total.unsqueeze(-1)).mul_(factor.unsqueeze(-1))
        rest = p if rest is None else rest.add_(p)
    g = torch.zeros_like(z) if rest is None else rest
    if "target" in slope:
        rows, columns = _here(labels, start, stop)
        g[rows, columns] += slope["target"][1][rows]
    if scale is None:
        with torch.enable_grad():
            leaf = s.detach().requires_grad_()
            (g,) = torch.autograd.grad(head.transform(leaf), leaf, g)
    elif scale != 1:
        g.mul_(scale)
    return g


def _here(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows whose label is in `[start, stop)`, and its place there."""
    rows = ((labels >= start) & (labels < stop)).nonzero().squeeze(-1)
    return rows, labels[rows] - start


def _exp_(x: Tensor) -> Tensor:
    """`eˣ` in place. On CPUs `exp2` is four times as fast as `exp`, and thirty times where the result is subnormal."""
    return x.mul_(_LOG2_E).exp2_()
