"""Pairwise softmax losses: cross-entropy whose pairs are bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class PairwiseSoftmax(LossSpec, name="pairwise_softmax"):
    """`log Σ_v a(d_v)^{1/outer}`, `d_v = (z_v − z_y) / temperature`, `a = tanh d + 1`, `[d + 1]₊` or `[atan d + 1]₊`.

    PSL, 2411.00163. `a = exp` would be cross-entropy; the others bound how much one negative can weigh. Meant for
    cosines (recommendation); no density.
    """

    activation: Literal["tanh", "relu", "atan"] = "tanh"
    temperature: Positive = 1.0
    outer: Positive = 1.0

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        d = (logits - pick(logits, labels).unsqueeze(-1)) / self.temperature
        if self.activation == "tanh":
            log_a = math.log(2) - F.softplus(-2 * d)  # log(tanh d + 1), finite for any d
        else:
            a = d + 1 if self.activation == "relu" else torch.atan(d) + 1
            log_a = a.clamp_min(torch.finfo(d.dtype).tiny).log()
        return (log_a / self.outer).logsumexp(-1)
