"""Distance between the student's and the teacher's last hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_softheads.losses.base import HiddenLoss


@dataclass(frozen=True)
class HiddenMSE(HiddenLoss, name="hidden_mse"):
    """`mean_d (h_d − t_d)²` of the hidden states that the heads read, student `h` and teacher `t` of the same width.

    Keeps a body in place while its head changes: a head of low rank passes back little of the logits' gradient.
    """

    def from_hidden(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        if hidden.shape != teacher.shape:
            raise ValueError(
                f"hidden_mse compares hidden states of one width, the student has {hidden.shape[-1]}, "
                f"the teacher {teacher.shape[-1]}"
            )
        return (hidden - teacher).square().mean(-1)
