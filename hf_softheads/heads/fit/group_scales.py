"""One scale for each row and group of columns: before its codes are known, and after."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.heads.fit.gptq import nearest_code

# Of the largest weight: where the grid of a group may end.
_SHRINK = torch.linspace(1.0, 0.5, 16).tolist()


def group_scales(
    weight: Tensor, importance: Tensor, bits: int, group: int, middle: float
) -> Tensor:
    """Scale of least squared error, columns weighted by `importance`, `(R, D / group)`, a bf16 number."""
    last = 2.0**bits - 1
    cut = weight.view(len(weight), -1, group)
    importance = importance.view(1, -1, group)
    largest = cut.abs().amax(-1, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    scale = torch.zeros_like(largest)
    for shrink in _SHRINK if bits < 8 else _SHRINK[:1]:
        step = (largest * (shrink / (last - middle))).bfloat16().float().clamp_min(1e-30)
        offset = step * -middle
        error = offset + step * nearest_code(cut, step, offset, last) - cut
        cost = (error.square() * importance).sum(-1, keepdim=True)
        scale = torch.where(cost < best, step, scale)
        best = torch.minimum(best, cost)
    return scale.squeeze(-1)


def refit_scales(rows: Tensor, levels: Tensor, scales: Tensor, moment: Tensor) -> Tensor:
    """Scales `(R, G)` of least `(v̂ - v) moment (v̂ - v)ᵀ`, `v̂ = scale · levels` group by group, as bf16 numbers.

    Those that would not be positive stay as they are.
    """
    count, groups = scales.shape
    metric, cut = moment.float(), levels.view(count, groups, -1)
    target = ((rows @ metric).view_as(cut) * cut).sum(-1)
    normal = rows.new_empty(count, groups, groups)
    for group, part in enumerate(metric.split(cut.shape[2])):
        normal[:, group] = ((cut[:, group] @ part).view_as(cut) * cut).sum(-1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    normal += ridge[:, None, None] * torch.eye(groups, device=rows.device)
    found = torch.linalg.solve(normal, target.unsqueeze(-1)).squeeze(-1).bfloat16().float()
    return torch.where(found > 0, found, scales)
