"""Cross-entropy of sigsoftmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick


@dataclass(frozen=True)
class Sigsoftmax(LossSpec, name="sigsoftmax"):
    """Cross-entropy of `p ∝ e^z σ(z)`, that is of the logits `z + log σ(z)`.

    Kanai et al., 1805.10829. Not limited by the rank of the head as softmax is; the same function must be used when
    the model is read out.
    """

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        scores = logits + F.logsigmoid(logits)
        return scores.logsumexp(-1) - pick(scores, labels)
