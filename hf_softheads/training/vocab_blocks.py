"""Losses that need a few numbers per token: the vocabulary of dense heads in blocks, gradients from these numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_softheads.losses.base import DivergenceLoss, LogitStatistic
from hf_softheads.training.token_chunks import PrecomputedGrad, Scorer, exp_, tiles, widened
from hf_softheads.training.two_heads import Divergences

COLUMNS = 64  # of a block, at least: narrower matrix products waste the machine

Combine = Callable[[Mapping[Any, Tensor]], Tensor]


def blocks(
    hidden: Tensor,
    labels: Tensor,
    head: Scorer,
    needs: frozenset[LogitStatistic],
    combine: Combine,
    *,
    elements: int,
    memory: int,
    divergences: Divergences | None = None,
) -> Tensor:
    """The scalar `combine(numbers)` of a dense head's logits, `elements` of them in a block.

    `hidden (n, D)`, `labels (n,)` in `[0, V)`; `combine` maps the numbers in `needs`, and those of every loss in
    `divergences`, each `(n,)`, to a scalar.
    The walk over the vocabulary finds the numbers, autograd of `combine` their gradients; then every block carries
    these to hidden states, weight and bias: `∂/∂z = a·p + b·1[y] + c/V + 2d·z/V`, and what the divergences add. Blocks
    of at most `memory` bytes, the teacher's counted, are kept in between, in the dtype of the hidden states; the others
    are computed again.
    """
    wanted = torch.is_grad_enabled()
    walks = _Walks(hidden, labels, head, needs, combine, divergences, elements)
    if not wanted:
        return walks.value(0)

    def compute() -> tuple[Tensor, list[Tensor | None]]:
        total = walks.value(memory)
        return total, walks.gradients(torch.ones_like(total), hidden.requires_grad)

    return PrecomputedGrad.apply(compute, hidden, head.weight, head.bias)  # type: ignore[no-any-return]


def blocks_per_token(
    hidden: Tensor,
    labels: Tensor,
    head: Scorer,
    needs: frozenset[LogitStatistic],
    combine: Combine,
    *,
    elements: int,
    divergences: Divergences | None = None,
) -> Tensor:
    """As `blocks`, for a `combine` that gives a value per token, `(n,)`; its backward pass computes scores again."""
    walks = _Walks(hidden, labels, head, needs, combine, divergences, elements)
    return _PerToken.apply(walks, hidden, head.weight, head.bias)  # type: ignore[no-any-return]


class _PerToken(torch.autograd.Function):
    """Values whose gradients are computed when they are asked for."""

    @staticmethod
    def forward(ctx: Any, walks: _Walks, *inputs: Tensor | None) -> Tensor:
        ctx.walks, ctx.trains_body = walks, inputs[0] is not None and inputs[0].requires_grad
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return walks.value(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = ctx.walks.gradients(grad, ctx.trains_body)
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return None, *(None if g is None else g.to(dtype) for g, dtype in pairs)


class _Block(NamedTuple):
    """Scores of the tokens from `start` to `stop`, before the transform: `(n, stop - start)`."""

    start: int
    stop: int
    scores: Tensor
    teacher: Tensor | None


class _Walks:
    """One call: the blocks in order, once for the numbers, once more for the gradients."""

    def __init__(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: Scorer,
        needs: frozenset[LogitStatistic],
        combine: Combine,
        divergences: Divergences | None,
        elements: int,
    ):
        self.hidden, self.labels, self.head = hidden.detach(), labels, head
        self.needs, self.combine, self.divergences = needs, combine, divergences
        vocab = len(head.weight)
        width = max(min(COLUMNS, vocab), elements // max(len(hidden), 1))
        self.spans = [(i, min(i + width, vocab)) for i in range(0, vocab, width)]
        self._kept: dict[int, _Block] = {}
        self._leaves: dict[LogitStatistic | DivergenceLoss, Tensor] = {}
        self._total: Tensor | None = None

    def value(self, memory: int) -> Tensor:
        """`combine(numbers)`; blocks of at most `memory` bytes are kept."""
        found: dict[Any, Tensor] = dict(self._summary(memory))
        if self.divergences is not None:
            found.update(self._divergences(self.divergences))
        self._leaves = {k: v.requires_grad_() for k, v in found.items()}
        with torch.enable_grad():
            numbers: dict[Any, Tensor] = dict(self._leaves)
            if "log_prob" in self.needs:
                numbers["log_prob"] = numbers["target"] - numbers["logsumexp"]
            self._total = self.combine(numbers)
        return self._total.detach()

    def gradients(self, grad: Tensor, trains_body: bool) -> list[Tensor | None]:
        """Of `Σ grad · value` with respect to hidden states, weight and bias."""
        assert self._total is not None
        leaves = list(self._leaves.values())
        found = torch.autograd.grad(self._total, leaves, grad, retain_graph=True, allow_unused=True)
        slope = {k: s for k, s in zip(self._leaves, found, strict=True) if s is not None}
        hidden, weight, bias = self.hidden, self.head.weight, self.head.bias
        grad_hidden = widened(torch.zeros_like(hidden)) if trains_body else None
        grad_weight = torch.empty_like(weight) if weight.requires_grad else None
        trains_bias = bias is not None and bias.requires_grad
        grad_bias = widened(torch.zeros_like(bias)) if trains_bias else None  # type: ignore[arg-type]
        for block in self._blocks(last=True):
            scores, columns = block.scores, slice(block.start, block.stop)
            for part in self._tiles(scores):
                g = self._gradient(block, part, slope)
                if grad_bias is not None:
                    grad_bias[columns] += g.sum(0)
                scores[part] = g
            if grad_hidden is not None:
                grad_hidden += scores @ weight[columns].to(scores.dtype)
            if grad_weight is not None:
                grad_weight[columns] = scores.T @ hidden.to(scores.dtype)
            del block, scores
        return [grad_hidden, grad_weight, grad_bias]

    def _blocks(self, memory: int = 0, *, last: bool = False) -> Iterator[_Block]:
        """In order, those that are kept from memory. The caller may overwrite what it gets for the last time."""
        for start, stop in self.spans:
            block = self._kept.pop(start, None) if last else self._kept.get(start)
            if block is None:
                scores, theirs = self.head.block(self.hidden, start, stop), None
                if self.divergences is not None:
                    theirs = self.divergences.block(start, stop).to(scores.device)
                block = _Block(start, stop, scores, theirs)
                memory -= block.scores.nbytes + (0 if theirs is None else theirs.nbytes)
                if memory >= 0:
                    self._kept[start] = block
            yield block
            del block  # given back while the gradient of the weight grows

    def _tiles(self, scores: Tensor) -> Iterator[slice]:
        return tiles(scores, 1 if self.divergences is None else 4)

    def _summary(self, memory: int) -> dict[LogitStatistic, Tensor]:
        """The independent numbers behind `needs`, in one walk, in which the divergences take part."""
        head, needs, vocab = self.head, self.needs, len(self.head.weight)
        zero = widened(self.hidden.new_zeros(len(self.hidden)))
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
        for block in self._blocks(memory):
            if "target" in found:
                rows, columns = _here(self.labels, block)
                found["target"][rows] = head.transform(widened(block.scores[rows, columns]))
            for part in self._tiles(block.scores):
                z = head.transform(widened(block.scores[part]))
                if self.divergences is not None and block.teacher is not None:
                    self.divergences.first(part, z, block.teacher[part])
                if "mean" in found:
                    found["mean"][part] += z.sum(-1) / vocab
                if "mean_square" in found:
                    found["mean_square"][part] += z.square().sum(-1) / vocab
                if "logsumexp" in found:
                    top = z.amax(-1, keepdim=True)
                    here = exp_(z - top).sum(-1).log_() + top.squeeze(-1)
                    found["logsumexp"][part] = torch.logaddexp(found["logsumexp"][part], here)
            del block  # before the next one is computed
        return found

    def _divergences(self, divergences: Divergences) -> dict[DivergenceLoss, Tensor]:
        """After the first walk."""
        divergences.finish()
        if divergences.walks_again:
            for block in self._blocks():
                assert block.teacher is not None
                for part in self._tiles(block.scores):
                    z = self.head.transform(widened(block.scores[part]))
                    divergences.second(part, z, block.teacher[part])
                del block
        return divergences.values()

    def _gradient(self, block: _Block, part: slice, slope: Mapping[Any, Tensor]) -> Tensor:
        """Of the total with respect to a tile of scores; `slope` has the gradients of the numbers."""
        vocab, transform = len(self.head.weight), self.head.transform
        s = widened(block.scores[part])
        z = transform(s)
        g: Tensor | None = None  # what goes through the softmax comes after the rest
        if self.divergences is not None and block.teacher is not None:
            g = self.divergences.gradient(part, z, block.teacher[part], slope)
        if "mean_square" in slope:
            g = _sum(g, z * (2 * slope["mean_square"][part] / vocab).unsqueeze(-1))
        if "mean" in slope:
            mean = (slope["mean"][part] / vocab).unsqueeze(-1)
            g = mean.expand_as(z).clone() if g is None else g.add_(mean)
        if "logsumexp" in slope:
            total, factor = self._leaves["logsumexp"].detach()[part], slope["logsumexp"][part]
            g = _sum(g, exp_(z - total.unsqueeze(-1)).mul_(factor.unsqueeze(-1)))
        if g is None:
            g = torch.zeros_like(z)
        if "target" in slope:
            rows, columns = _here(self.labels[part], block)
            g[rows, columns] += slope["target"][part][rows]
        if transform.scale is None:
            with torch.enable_grad():
                leaf = s.detach().requires_grad_()
                (g,) = torch.autograd.grad(transform(leaf), leaf, g)
        elif transform.scale != 1:
            g.mul_(transform.scale)
        return g


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


def _here(labels: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """Rows whose label is in the block, and its place there."""
    rows = ((labels >= block.start) & (labels < block.stop)).nonzero().squeeze(-1)
    return rows, labels[rows] - block.start
