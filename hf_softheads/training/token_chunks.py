"""Losses over the vocabulary without all `(tokens, V)` logits in fp32: gradients are computed in the forward pass.

Two ways. `blocks` walks over the vocabulary in blocks, for losses that need only a few numbers per token. `chunks`
walks over the tokens in chunks with all their logits, for every other loss. Both keep only gradients of the size of
the inputs, so the backward pass merely scales them; they can be taken once. Large matrix products, in the dtype of the
hidden states, and element-wise work in fp32 on tiles that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.base import LogitTransform

OfTile = Callable[[Tensor, slice], Tensor]
_LOG2_E = 1.4426950408889634


class Scorer(NamedTuple):
    """A dense head as tensors: `transform(F.linear(hidden, weight, bias))`."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def block(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Scores before the transform, `(n, stop - start)`, in the dtype of the hidden states."""
        bias = None if self.bias is None else self.bias[start:stop].to(hidden)
        return F.linear(hidden, self.weight[start:stop].to(hidden), bias)


def widened(x: Tensor) -> Tensor:
    """`x` in float64 if it is, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


def exp(x: Tensor) -> Tensor:
    """`eˣ`. On CPUs `exp2` is four times as fast as `exp`, and thirty times where the result is subnormal."""
    return (x * _LOG2_E).exp2_()


def exp_(x: Tensor) -> Tensor:
    """`eˣ` in place."""
    return x.mul_(_LOG2_E).exp2_()


class PrecomputedGrad(torch.autograd.Function):
    """A total whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], *inputs: Tensor | None) -> Tensor:
        total, ctx.gradients = compute()
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of this loss were computed in its forward pass and have been handed over; "
                "call the Objective again instead of backward(retain_graph=True), or use reduction='none'"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = []
        for g, dtype in zip(gradients, ctx.dtypes, strict=True):
            if g is not None and (grad.device.type != "cpu" or float(grad) != 1.0):
                g.mul_(grad)
            scaled.append(None if g is None else g.to(dtype))
        return None, *scaled


def tiles(scores: Tensor, parts: int = 1) -> Iterator[slice]:
    """Rows of `scores (n, width)` whose element-wise work stays in a CPU's cache; `parts` times as small on request."""
    n, width = scores.shape
    rows = max(1, (2**19 if scores.device.type == "cpu" else 2**25) // parts // width)
    return (slice(i, min(i + rows, n)) for i in range(0, n, rows))


def chunks(
    hidden: Tensor,
    parameters: Sequence[Tensor],
    score: Callable[[Tensor], Tensor] | Scorer,
    loss: Callable[[slice], OfTile],
    *,
    rows: int,
) -> Tensor:
    """`Σ loss` over chunks of `rows` hidden states, with the logits of one chunk alive at a time.

    `score`: hidden states to logits, with the parameters whose gradients are wanted; or a dense head, whose products
    take a chunk and whose element-wise work takes tiles of it. `loss(chunk)` gives the function of a tile's logits and
    of its place in the chunk, to a scalar; no gradient flows to the hidden states but through the logits.
    """
    spans = [slice(i, min(i + rows, len(hidden))) for i in range(0, len(hidden), rows)]
    zero = widened(hidden.new_zeros(()))
    if not torch.is_grad_enabled():
        return sum((_value(hidden[s], score, loss(s)) for s in spans), zero)
    dense = isinstance(score, Scorer)
    inputs: list[Tensor | None] = [score.weight, score.bias] if dense else list(parameters)  # type: ignore[union-attr]

    def compute() -> tuple[Tensor, list[Tensor | None]]:
        total = zero.clone()
        # a sum of two is as good in the parameter's own dtype
        like = widened if len(spans) > 2 else torch.clone
        sums = [
            None if p is None or not p.requires_grad else like(torch.zeros_like(p)) for p in inputs
        ]
        grad_hidden = widened(torch.zeros_like(hidden)) if hidden.requires_grad else None
        for s in spans:
            into = None if grad_hidden is None else grad_hidden[s]
            if isinstance(score, Scorer):
                total += _dense_chunk(hidden[s].detach(), score, loss(s), into, sums)
                continue
            with torch.enable_grad():
                h = hidden[s].detach().requires_grad_()
                part = loss(s)(score(h), slice(0, len(h)))
                grads = torch.autograd.grad(part, [h, *parameters], allow_unused=True)
            total += part.detach()
            for to, g in zip([into, *sums], grads, strict=True):
                if to is not None and g is not None:
                    to += g
        return total, [grad_hidden, *sums]

    return PrecomputedGrad.apply(compute, hidden, *inputs)  # type: ignore[no-any-return]


def _value(hidden: Tensor, score: Callable[[Tensor], Tensor] | Scorer, of_tile: OfTile) -> Tensor:
    if not isinstance(score, Scorer):
        return of_tile(score(hidden), slice(0, len(hidden)))
    scores = score.block(hidden, 0, len(score.weight))
    parts = [of_tile(score.transform(widened(scores[tile])), tile) for tile in tiles(scores)]
    return torch.stack(parts).sum()


def _dense_chunk(
    hidden: Tensor,
    head: Scorer,
    of_tile: OfTile,
    grad_hidden: Tensor | None,
    sums: Sequence[Tensor | None],
) -> Tensor:
    """The value of one chunk; its gradients are added to what is given."""
    scores = head.block(hidden, 0, len(head.weight))
    total = widened(hidden.new_zeros(()))
    grad_weight, grad_bias = sums
    for tile in tiles(scores):
        with torch.enable_grad():
            s = widened(scores[tile]).detach().requires_grad_()
            value = of_tile(head.transform(s), tile)
            (g,) = torch.autograd.grad(value, s)
        total += value.detach()
        if grad_bias is not None:
            grad_bias += g.sum(0)
        scores[tile] = g
    if grad_hidden is not None:
        grad_hidden += scores @ head.weight.to(scores.dtype)
    if grad_weight is not None:
        step = max(1, 2**22 // hidden.shape[-1])
        x = hidden.to(scores.dtype)
        for i in range(0, len(grad_weight), step):
            grad_weight[i : i + step] += scores[:, i : i + step].T @ x
    return total


def candidate_logits(
    hidden: Tensor, labels: Tensor, ids: Tensor, head: Scorer, *, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Logits of the labels `(n,)` and of the tokens `ids (S,)`, `(n, S)`, from their rows alone."""
    own, others = head.weight[labels].to(hidden.dtype), head.weight[ids].to(hidden.dtype)
    if cosine:
        x = F.normalize(widened(hidden), dim=-1)
        own, others = F.normalize(widened(own), dim=-1), F.normalize(widened(others), dim=-1)
        return (x * own).sum(-1), x @ others.T
    target, rest = widened((hidden * own).sum(-1)), widened(hidden @ others.T)
    if head.bias is not None:
        target, rest = target + head.bias[labels], rest + head.bias[ids]
    return head.transform(target), head.transform(rest)
