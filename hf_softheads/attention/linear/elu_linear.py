"""The first linear attention: elu + 1 as feature map."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_softheads.attention.call import Inputs, Params
from hf_softheads.attention.linear.base import LinearSpec
from hf_softheads.attention.linear.past import Past
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class EluLinear(LinearSpec, name="elu_linear"):
    """`w ∝ φ(q)·φ(k)`, `φ(x) = elu(x) + 1`, divided by `Σ w + ε`

    Source: arXiv:2006.16236.

    Args:
        eps: ε.
    """

    eps: Positive = 1e-6

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        return past.mean(raised(inputs.query), raised(inputs.key), inputs.value, self.eps)


def raised(x: Tensor) -> Tensor:
    """`elu(x) + 1`, without the rounding of `exp(x) - 1 + 1`."""
    return x.relu() + x.clamp(max=0).exp()
