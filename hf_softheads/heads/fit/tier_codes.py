"""Codes, scales and offsets of the columns of a tier of rows, for `transform_coded`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_softheads.heads.fit.bit_allocation import STEP
from hf_softheads.heads.fit.blockwise import blocks
from hf_softheads.heads.fit.gptq import nearest_code, round_with_feedback

_STRETCH = (0.75, 0.85, 0.93, 1.0, 1.08, 1.18, 1.3, 1.5)  # of the step, tried on the data
_ROWS = 2048  # rounded at once


def coordinates(weight: Tensor, tokens: Tensor, center: Tensor, project: Tensor) -> Tensor:
    """`(weight[tokens] - center) @ project`, `(n, K)` fp32, a block of rows at a time."""
    points = torch.empty(len(tokens), project.shape[1], device=weight.device)
    for which in blocks(len(tokens)):
        points[which] = (weight[tokens[which]].float() - center) @ project
    return points


def quantize_tier(head: Any, tier: int, points: Tensor, labels: Tensor, moments: Tensor) -> None:
    """Codes, scales and offsets of one tier from its `points (n, K)`; `labels` choose each row's metric."""
    bits = head.bits[tier].long()
    variance, mean = torch.var_mean(points, 0, correction=0)
    best = torch.full_like(mean, torch.inf)
    step, last = torch.ones_like(mean), (2.0**bits - 1).to(mean)
    spread = torch.tensor(STEP, device=mean.device)[bits] * variance.sqrt()
    for stretch in _STRETCH:
        trial = (spread * stretch).bfloat16().float().clamp_min(1e-30)
        offset = (mean - trial * last / 2).bfloat16().float()
        cost = torch.zeros_like(mean)
        for which in blocks(len(points)):
            part = points[which]
            error = offset + trial * nearest_code(part, trial, offset, last) - part
            cost += error.square().sum(0)
        step = torch.where(cost < best, trial, step)
        best = torch.minimum(best, cost)
    offset = (mean - step * last / 2).bfloat16().float()
    head.scale[tier], head.offset[tier] = step, offset
    coarsest = best.argsort(
        descending=True
    )  # their errors are known first, the fine columns undo them
    codes = torch.empty(points.shape, dtype=torch.uint8, device=points.device)
    for label in labels.unique().tolist():
        for mine in (labels == label).nonzero().flatten().split(_ROWS):
            codes[mine] = round_with_feedback(
                points[mine], step, offset, last, moments[label], coarsest
            )
    head.pack_tier(tier, codes)
