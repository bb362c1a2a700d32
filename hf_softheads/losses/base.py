"""What every loss is: a value per token from one chunk of logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_softheads.registry import Spec


@dataclass(frozen=True)
class LossSpec(Spec, kind="loss"):
    """A loss over the vocabulary. Shift, mask, chunking, reduction and the teacher's forward are the Objective's."""

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """`logits (N, V)` fp32, `labels (N,)`, teacher logits `(N, V)` fp32 or None, to `(N,)`. No reduction."""
        raise NotImplementedError
