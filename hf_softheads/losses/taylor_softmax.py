"""Cross-entropy of the second-order Taylor softmax."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick


@dataclass(frozen=True)
class TaylorSoftmax(LossSpec, name="taylor_softmax"):
    """`log Σ_v t(z_v) − log t(z_y)` with `t(z) = 1 + z + z²/2`, which is positive everywhere.

    de Brébisson & Vincent, 1511.05042. Even around `z = −1`, so large negative logits are likely tokens: for models
    trained with it from the start.
    """

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        t = 0.5 + (logits + 1).square() / 2  # the same polynomial, without cancellation
        return t.sum(-1).log() - pick(t, labels).log()
