"""The softmax over the latest keys and the first ones, which heads use as sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, Params, own_key
from hf_softheads.registry import Count, CountOrZero


@dataclass(frozen=True)
class SlidingWindow(AttentionSpec, name="sliding_window"):
    """softmax(z) over the first `sinks` keys that a query sees and the `window` latest, of every `dilation`-th

    Source: arXiv:2309.17453 (StreamingLLM) for sinks and window, without its new positions; arXiv:2004.05150 for
    dilation and two sides. `dilation · window` tokens are reached. The cache keeps all keys.

    Args:
        window: keys, the query's own one included; on either side, where it has two.
        sinks: keys at the beginning that stay visible.
        dilation: distance between the keys of the window.
        two_sided: earlier and later keys, for encoders.
    """

    window: Count = 1024
    sinks: CountOrZero = 4  # type: ignore[misc, assignment]  # as a tag: heads need them
    dilation: Count = 1
    two_sided: bool = False
    exact_zeros: ClassVar[bool] = True

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        if not inputs.causal and not self.two_sided:
            raise ValueError(
                "sliding_window looks back only, and an encoder's attention reads both ways; give two_sided=True"
            )
        return super().forward(inputs.replace(keep=self._keep(inputs)), params)

    def _keep(self, inputs: Inputs) -> Tensor:
        """The visible keys `(B or 1, 1, Q, K)`; nothing of that size but truth values is made on the way."""
        index = torch.arange(inputs.key.shape[2], device=inputs.key.device)
        own = own_key(inputs).unsqueeze(-1)
        keep = index <= own if inputs.keep is None else inputs.keep
        reach = self.window * self.dilation
        near = (index > own - reach) & (index < own + reach)
        near = near & (index % self.dilation == own % self.dilation)
        last = torch.full_like(keep[..., :1], -1, dtype=torch.long)  # of the sinks, for each query
        for _ in range(self.sinks):
            left = keep & (index > last)
            last = torch.where(left.any(-1, True), left.to(torch.uint8).argmax(-1, True), last)
        return keep & (near | (index <= last))
