"""SWAT: sigmoid attention in a sliding window, with a linear position bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_softheads.attention.call import Inputs, Params
from hf_softheads.attention.sigmoid import Sigmoid
from hf_softheads.registry import Count


@dataclass(frozen=True)
class SWAT(Sigmoid, name="swat"):
    """`w = σ(z + s_h · (m - n))` for the last `window` keys, m the query's index, n the key's

    Source: arXiv:2502.18845, eq. 3-5. The slopes of half the heads are `-2^-k`, of the other half `+2^-k`,
    `k = 1 … H/2` (`"balanced"`); or all of one sign, `k = 1 … H`.

    Args:
        window: keys that a row sees, its own included.
        slopes: `"balanced"`, `"negative"` (the paper's best average) or `"positive"`.
    """

    window: Count = 512
    slopes: Literal["balanced", "negative", "positive"] = "balanced"

    def __post_init__(self) -> None:
        if self.alibi:
            raise ValueError("swat has slopes of its own; alibi=True is for `sigmoid`")

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        slopes = self.slopes_of(inputs.query.shape[1]).to(inputs.query.device)
        return super().forward(inputs.replace(slopes=slopes, window=self.window), params)

    def slopes_of(self, heads: int) -> Tensor:
        """`(H,)`.

        Raises:
            ValueError: balanced slopes need an even number of heads.
        """
        if self.slopes != "balanced":
            steps = 2.0 ** -torch.arange(1.0, heads + 1)
            return steps if self.slopes == "positive" else -steps
        if heads % 2:
            raise ValueError(
                f"balanced slopes need an even number of heads, got {heads}; use slopes='negative'"
            )
        steps = 2.0 ** -torch.arange(1.0, heads // 2 + 1)
        return torch.cat([-steps, steps])
