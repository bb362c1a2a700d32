"""Cross-entropy with annealed noise on the label's logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class NoisySoftmax(LossSpec, name="noisy_softmax"):
    """Cross-entropy with `z_y ← z_y − α (‖w_y‖‖h‖ − z_y) |ξ|`, `ξ ~ N(0, 1)` per token from torch's generator.

    Chen et al., 1708.03769, where `z_y = ‖w_y‖‖h‖ cos θ`. The noise keeps easy tokens from saturating the softmax.
    `norms`: `‖w_y‖‖h‖` `(N,)`, which the Objective gives for a dense head; without it the row's largest |z|, the
    least value that Cauchy–Schwarz allows.
    """

    alpha: Positive = 0.1

    def per_token(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        *,
        norms: Tensor | None = None,
    ) -> Tensor:
        target = pick(logits, labels)
        bound = logits.detach().abs().amax(-1) if norms is None else norms
        noise = torch.randn(target.shape, device=logits.device, dtype=logits.dtype).abs()
        noisy = target - self.alpha * (bound - target) * noise
        return logits.scatter(-1, labels.unsqueeze(-1), noisy.unsqueeze(-1)).logsumexp(-1) - noisy
