"""Losses over the vocabulary without the `(tokens, V)` logits: gradients are computed in the forward pass.

Two ways. `blocks`: the vocabulary is walked twice in blocks, for losses that need only a few numbers per token.
`chunks`: the tokens are walked once in chunks with all their logits, for every other loss. Both keep only gradients
of the size of the inputs, so the backward pass merely scales them; they can be taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.base import LogitTransform
from hf_softheads.losses.base import Number

ROWS = 256  # columns of a block, at least: narrower matrix products waste the machine


class Scorer(NamedTuple):
    """A dense head as tensors: `transform(F.linear(hidden, weight, bias))`."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def block(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Scores before the transform, `(n, stop - start)`, at least fp32."""
        bias = None if self.bias is None else self.bias[start:stop].to(hidden.dtype)
        return widened(F.linear(hidden, self.weight[start:stop].to(hidden.dtype), bias))


def widened(x: Tensor) -> Tensor:
    """`x` in float64 if it is, else in float32."""
    return x if x.dtype == torch.float64 else x.float()


class _GivenOnce(torch.autograd.Function):
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


def blocks(
    hidden: Tensor,
    labels: Tensor,
    head: Scorer,
    needs: frozenset[Number],
    combine: Callable[[dict[Number, Tensor]], Tensor],
    *,
    elements: int,
) -> Tensor:
    """The scalar `combine(numbers)` of a dense head's logits, with `elements` of them alive at a time.

    `hidden (n, D)`, `labels (n,)` in `[0, V)`; `combine` maps the numbers in `needs`, each `(n,)`, to a scalar.
    The first walk over the vocabulary finds the numbers, autograd of `combine` their gradients, the second walk
    carries these to hidden states, weight and bias: `∂/∂z = a·p + b·1[y] + c/V + 2d·z/V`.
    """
    vocab = len(head.weight)
    width = max(min(ROWS, vocab), elements // max(len(hidden), 1))
    spans = [(i, min(i + width, vocab)) for i in range(0, vocab, width)]
    wanted = torch.is_grad_enabled()

    def compute() -> tuple[Tensor, list[Tensor | None]]:
        x = hidden.detach()
        leaves = {k: v.requires_grad_() for k, v in _numbers(x, labels, head, needs, spans).items()}
        with torch.enable_grad():
            total = combine(_derived(leaves, needs))
        if not wanted:
            return total.detach(), []
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        slope = {k: s for k, s in zip(leaves, slopes, strict=True) if s is not None}
        return total.detach(), _carry_back(x, labels, head, leaves, slope, spans)

    if not wanted:
        return compute()[0]
    return _GivenOnce.apply(compute, hidden, head.weight, head.bias)  # type: ignore[no-any-return]


def _numbers(
    hidden: Tensor, labels: Tensor, head: Scorer, needs: frozenset[Number], spans: Any
) -> dict[Number, Tensor]:
    """The independent numbers behind `needs`, in one walk."""
    n, vocab = len(hidden), len(head.weight)
    zero = widened(hidden.new_zeros(n))
    log_prob = "log_prob" in needs
    found: dict[Number, Tensor] = {}
    if log_prob or "logsumexp" in needs:
        found["logsumexp"] = torch.full_like(zero, -torch.inf)
    if log_prob or "target" in needs:
        found["target"] = zero.clone()
    if "mean" in needs:
        found["mean"] = zero.clone()
    if "mean_square" in needs:
        found["mean_square"] = zero.clone()
    for start, stop in spans:
        z = head.transform(head.block(hidden, start, stop))
        if "target" in found:
            rows, columns = _here(labels, start, stop)
            found["target"][rows] = z[rows, columns]
        if "mean" in found:
            found["mean"] += z.sum(-1) / vocab
        if "mean_square" in found:
            found["mean_square"] += z.square().sum(-1) / vocab
        if "logsumexp" in found:
            top = z.amax(-1, keepdim=True)
            part = z.sub_(top).exp_().sum(-1).log_() + top.squeeze(-1)
            found["logsumexp"] = torch.logaddexp(found["logsumexp"], part)
    return found


def _derived(leaves: dict[Number, Tensor], needs: frozenset[Number]) -> dict[Number, Tensor]:
    if "log_prob" in needs:
        return {**leaves, "log_prob": leaves["target"] - leaves["logsumexp"]}
    return leaves


def _carry_back(
    hidden: Tensor,
    labels: Tensor,
    head: Scorer,
    numbers: dict[Number, Tensor],
    slope: dict[Number, Tensor],
    spans: Any,
) -> list[Tensor | None]:
    vocab = len(head.weight)
    scale = head.transform.scale
    wants_weight = head.weight.requires_grad
    grad_hidden = widened(torch.zeros_like(hidden))
    grad_weight = torch.empty_like(head.weight) if wants_weight else None
    grad_bias = (
        torch.empty_like(head.bias) if head.bias is not None and head.bias.requires_grad else None
    )
    for start, stop in spans:
        s = head.block(hidden, start, stop)
        z = head.transform(s)
        rest = None  # what does not go through the softmax
        if "mean_square" in slope:
            rest = z * (2 * slope["mean_square"] / vocab).unsqueeze(-1)
        if "mean" in slope:
            mean = (slope["mean"] / vocab).unsqueeze(-1)
            rest = mean.expand_as(z).clone() if rest is None else rest.add_(mean)
        if "logsumexp" in slope:
            p = z.sub_(numbers["logsumexp"].detach().unsqueeze(-1)).exp_()
            p.mul_(slope["logsumexp"].unsqueeze(-1))
            rest = p if rest is None else rest.add_(p)
        g = torch.zeros_like(z) if rest is None else rest
        if "target" in slope:
            rows, columns = _here(labels, start, stop)
            g[rows, columns] += slope["target"][rows]
        if scale is None:
            with torch.enable_grad():
                s.requires_grad_()
                (g,) = torch.autograd.grad(head.transform(s), s, g)
        elif scale != 1:
            g.mul_(scale)
        if grad_bias is not None:
            grad_bias[start:stop] = g.sum(0)
        g = g.to(hidden.dtype)
        grad_hidden += g @ head.weight[start:stop].to(hidden.dtype)
        if grad_weight is not None:
            grad_weight[start:stop] = g.T @ hidden
    return [grad_hidden, grad_weight, grad_bias]


def _here(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Rows whose label is in `[start, stop)`, and its place there."""
    rows = ((labels >= start) & (labels < stop)).nonzero().squeeze(-1)
    return rows, labels[rows] - start


class _Accumulate(torch.autograd.Function):
    """`F.linear` whose backward adds the weight's gradient to fp32 buffers, in blocks of rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Scorer, into: list[Tensor | None]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.head, ctx.into = head, into
        return head.block(hidden, 0, len(head.weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        weight, (into_weight, into_bias) = ctx.head.weight, ctx.into
        g = grad.to(hidden.dtype)
        if into_weight is not None:
            step = max(1, 2**22 // weight.shape[-1])
            for i in range(0, len(weight), step):
                into_weight[i : i + step] += g[:, i : i + step].T @ hidden
        if into_bias is not None:
            into_bias += grad.sum(0)
        return g @ weight.to(g.dtype), None, None


def chunks(
    hidden: Tensor,
    parameters: Sequence[Tensor],
    score: Callable[[Tensor], Tensor] | Scorer,
    loss: Callable[[Tensor, Tensor, slice], Tensor],
    *,
    rows: int,
) -> Tensor:
    """`Σ loss(h, logits, slice)` over chunks of `rows` hidden states, the logits of one chunk alive at a time.

    `score`: hidden states to logits, with the parameters whose gradients are wanted; or a dense head, whose weight
    gradient is then summed in fp32 without a copy per chunk. `loss` gives a scalar.
    """
    spans = [slice(i, min(i + rows, len(hidden))) for i in range(0, len(hidden), rows)]
    zero = widened(hidden.new_zeros(()))
    if not torch.is_grad_enabled():
        scored = _plain(score)
        return sum((loss(hidden[s], scored(hidden[s]), s) for s in spans), zero)
    dense = isinstance(score, Scorer)
    inputs: list[Tensor | None] = [score.weight, score.bias] if dense else list(parameters)  # type: ignore[union-attr]

    def compute() -> tuple[Tensor, list[Tensor | None]]:
        total = zero.clone()
        sums = [
            None if p is None or not p.requires_grad else widened(torch.zeros_like(p))
            for p in inputs
        ]
        grad_hidden = widened(torch.zeros_like(hidden)) if hidden.requires_grad else None
        for s in spans:
            with torch.enable_grad():
                h = hidden[s].detach().requires_grad_()
                if isinstance(score, Scorer):
                    logits = score.transform(_Accumulate.apply(h, score, sums))
                else:
                    logits = score(h)
                part = loss(h, logits, s)
                leaves = [h] if dense else [h, *parameters]
                grads = torch.autograd.grad(part, leaves, allow_unused=True)
            del logits
            total += part.detach()
            if grad_hidden is not None and grads[0] is not None:
                grad_hidden[s] = grads[0]
            for into, g in zip(sums, grads[1:], strict=False):
                if into is not None and g is not None:
                    into += g
        return total, [grad_hidden, *sums]

    return _GivenOnce.apply(compute, hidden, *inputs)  # type: ignore[no-any-return]


def _plain(score: Callable[[Tensor], Tensor] | Scorer) -> Callable[[Tensor], Tensor]:
    if isinstance(score, Scorer):
        return lambda h: score.transform(score.block(h, 0, len(score.weight)))
    return score


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
