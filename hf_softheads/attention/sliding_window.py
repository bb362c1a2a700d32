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
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        device = inputs.key.device
        index = torch.arange(keys, device=device)
        distance = own_key(inputs).unsqueeze(-1) - index
        keep = distance >= 0 if inputs.keep is None else inputs.keep
        near = (distance.abs() < self.window * self.dilation) & (distance % self.dilation == 0)
        first = keep.expand(-1, -1, queries, -1).cumsum(-1) <= self.sinks
        return keep & (near | first)
