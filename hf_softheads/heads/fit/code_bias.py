"""A bias per token for heads whose tokens share codes: the law within a code, and the mass of each code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.forms.vq_module import VQHead

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_IPF_STEPS = 30
_IPF_ELEMENTS = 2**24  # states × codes used to fit the code marginals


def code_bias(head: VQHead, labels: Tensor, stats: HeadStats, *, fitted: bool) -> Tensor:
    """`log π(token | code)` plus an offset per code, `(V,)` fp32.

    Fitted: π is the dense model's mean probability and the offset gives each code the mass of its tokens. Else π
    counts tokens and the offset is `log n_code`, which leaves each code the mass that it has.
    """
    codes = len(head.weight)
    prior = (stats.mean_prob.double() if fitted else stats.frequency).to(labels.device)
    mass = prior.new_zeros(codes).index_add_(0, labels, prior)
    law = (prior / mass[labels]).log() / head.gain
    if fitted:
        offsets = _code_offsets(head, stats, mass.float()).double()
    else:
        offsets = torch.bincount(labels, minlength=codes).double().log() / head.gain
    return (law + offsets[labels]).float()


def _code_offsets(head: VQHead, stats: HeadStats, mass: Tensor) -> Tensor:
    """`a` with `E_h[softmax(codebook · h + a)] = mass`, by iterative proportional fitting; `(C,)`."""
    count = max(256, _IPF_ELEMENTS // len(mass))
    states = stats.states[:count].to(mass.device)
    scores = F.linear(states, head.weight.float())  # (S, C)
    transform = head.transform or (lambda z: z)
    offsets = torch.zeros_like(mass)
    for _ in range(_IPF_STEPS):
        predicted = transform(scores + offsets).softmax(-1).mean(0)
        step = (mass.clamp_min(1e-20) / predicted.clamp_min(1e-20)).log()
        offsets += torch.where(mass > 0, step, 0) / head.gain
    return offsets
