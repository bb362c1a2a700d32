"""The best of all logits: by the C++ kernel where there is one, and what heads do alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_softheads.heads.forms.sampling import check_temperature
from hf_softheads.kernels import screened, why_not

if TYPE_CHECKING:
    from hf_softheads.heads.base import Head


def largest(scores: Tensor, count: int, kernels: str) -> tuple[Tensor, Tensor]:
    """`scores.topk(count)` of `scores (N, V)`; `kernels`: see `Head.use_kernels`."""
    best = screened.largest if _compiled(scores, kernels) else torch.topk
    values, tokens = best(scores, count)
    return values, tokens


def logsumexp(scores: Tensor, kernels: str) -> Tensor:
    """`scores.logsumexp(-1)` of `scores (N, V)`."""
    total: Tensor = (
        screened.logsumexp(scores) if _compiled(scores, kernels) else scores.logsumexp(-1)
    )
    return total


def _compiled(scores: Tensor, kernels: str) -> bool:
    """Does the kernel go over these scores, instead of torch?"""
    return (
        kernels != "off"
        and not scores.requires_grad
        and scores.device.type == "cpu"
        and scores.dtype == torch.float32
        and scores.ndim == 2
        and why_not("screened") is None
    )


def packed(values: Tensor, tokens: Tensor, *totals: Tensor) -> Tensor:
    """`(N, k)` twice and `(N,)` each as one tensor, in which token ids are exact."""
    return torch.cat([values.double(), tokens.double(), *(t.double()[:, None] for t in totals)], -1)


def unpacked(found: Tensor, k: int) -> tuple[Tensor, ...]:
    """What `packed` was given."""
    totals = found[..., 2 * k :].float().unbind(-1)
    return found[..., :k].float(), found[..., k : 2 * k].long(), *totals


def by_two_passes(
    head: Head, hidden: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`Head.topk_logsumexp` of a head whose structure makes both parts cheap."""
    check_temperature(temperature)
    values, tokens = head.topk(hidden, k)
    if temperature == 1.0:
        return values, tokens, head.logsumexp(hidden)
    log_p = head.token_numbers(hidden, tokens[..., 0], temperature, moments=False)[..., 0]
    return values, tokens, values[..., 0] / temperature - log_p
