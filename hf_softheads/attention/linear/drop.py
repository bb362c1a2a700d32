"""No attention: the layer passes its input on, and keeps neither keys nor values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.attention.call import Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.past import Past


@dataclass(frozen=True)
class Drop(LinearSpec, name="drop"):
    """`w = 0`

    Source: this project, after layer dropping in vision transformers. What is left of the layer is its residual, and
    the bias of its output projection where it has one. The cheapest point of a mixed schedule, for the layers that a
    model misses least; its cache is empty.
    """

    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True
    sinks: ClassVar[bool] = False

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        # zeros that training can go back through
        nothing = inputs.query[..., :1] * 0
        return nothing.expand(*inputs.query.shape[:3], inputs.value.shape[-1])
