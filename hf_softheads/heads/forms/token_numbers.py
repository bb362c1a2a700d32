"""What a trainer wants to know about each token's distribution, from logits or from blocks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class TokenStatistics(NamedTuple):
    """Of every hidden state: `log p(label)` and the entropy of `p` in nats, fp32, and the likeliest token, int64."""

    log_prob: Tensor
    entropy: Tensor
    argmax: Tensor


def of_logits(logits: Tensor, labels: Tensor, moments: bool) -> Tensor:
    """`log p(label)`, entropy and the best token, `(…, V)` and `(…)` → `(…, 3)` in the dtype of the logits.

    With `moments` two more, without gradients: the mean logit and `log Σ p²`. Tokens are exact below 2²⁴ in fp32. A
    token of logit -inf adds nothing to the entropy.
    """
    log_p = logits.log_softmax(-1)  # its own maximum taken off: large logits keep small entropies
    found = [log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), _entropy(log_p)]
    found.append(logits.argmax(-1).to(logits.dtype))
    if moments:
        found += [logits.detach().mean(-1), (2 * log_p.detach()).logsumexp(-1)]
    return torch.stack(found, -1)


def over_blocks(
    block: Callable[..., Tensor],
    spans: Sequence[tuple[int, int]],
    pieces: Sequence[tuple[Any, ...]],
    hidden: Tensor,
    places: Tensor,
    moments: bool,
) -> Tensor:
    """`of_logits` without the logits: `(n, 3)`, or `(n, 5)`.

    `block(hidden, *piece)` gives the logits of the tokens of one span; the backward pass computes it again.
    `places (n,)`: the labels.
    """

    def part(hidden: Tensor, places: Tensor, start: int, stop: int, *piece: Any) -> Tensor:
        z = block(hidden, *piece)
        total = z.logsumexp(-1)
        inside = (places >= start) & (places < stop)
        where = (places - start).clamp(0, stop - start - 1).unsqueeze(-1)
        best, which = z.detach().max(-1)
        found = [
            total,
            torch.where(inside, z.gather(-1, where).squeeze(-1), 0),
            _entropy(z.log_softmax(-1)),
            best,
            which.to(z.dtype) + start,
        ]
        if moments:
            found += [z.detach().sum(-1), (2 * z.detach()).logsumexp(-1)]
        return torch.stack(found, -1)

    recomputed = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    parts = [
        checkpoint(part, hidden, places, *span, *piece, use_reentrant=False)
        if recomputed
        else part(hidden, places, *span, *piece)
        for span, piece in zip(spans, pieces, strict=True)
    ]
    totals, picked, inner, best, which, *rest = torch.stack(parts, 1).unbind(-1)  # (n, blocks)
    total = totals.logsumexp(-1, keepdim=True)
    share = totals - total  # log-probability of each block
    found = [
        picked.sum(-1) - total.squeeze(-1),
        (share.exp() * (inner - share)).sum(-1),
        which.gather(-1, best.argmax(-1, keepdim=True)).squeeze(-1),
    ]
    if moments:
        mean = rest[0].sum(-1) / spans[-1][1]
        found += [mean, rest[1].logsumexp(-1) - 2 * total.detach().squeeze(-1)]
    return torch.stack(found, -1)


def labelled(
    numbers: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, labels: Tensor, ignore_index: int
) -> Tensor:
    """`numbers(hidden, labels)`, `(…, k)`, of the labelled states alone; exactly 0 for the others."""
    labels = labels.to(hidden.device)
    keep = labels != ignore_index
    if torch.compiler.is_compiling():  # data-dependent shapes would break the graph
        found = numbers(hidden, torch.where(keep, labels, 0))
        return torch.where(keep.unsqueeze(-1), found, 0.0)
    found = numbers(hidden[keep], labels[keep])
    out = found.new_zeros((*labels.shape, found.shape[-1]))
    return out.masked_scatter(keep.unsqueeze(-1), found)


def as_statistics(numbers: Tensor) -> TokenStatistics:
    """From `(…, 3)`, as `of_logits` gives them."""
    log_prob, entropy, best = numbers.unbind(-1)
    return TokenStatistics(log_prob, entropy, best.detach().long())


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
