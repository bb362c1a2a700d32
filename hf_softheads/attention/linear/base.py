"""What every variant with a recurrent state is: features of queries and keys, and what is made of sums over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Block, Inputs, Params, RowMap, ScoreForm, wide
from hf_softheads.attention.linear.past import Past


@dataclass(frozen=True)
class LinearSpec(AttentionSpec):
    """A variant whose sums over keys are kept in a state of fixed size. A variant overrides `mix`.

    It has no scores, so the layer's scaling and soft cap do not act on it unless it says so; a bias is refused.
    """

    has_state: ClassVar[bool] = True

    def mix(self, inputs: Inputs, params: Params, past: Past) -> Tensor:
        """The values mixed, `(B, H, Q, Dv)`: linear in `inputs.value`. Query, key and value are fp32 or float64."""
        raise NotImplementedError

    def output(self, mixed: Tensor, inputs: Inputs, params: Params) -> Tensor:
        """What becomes of the mixed values: a norm, a gate."""
        return mixed

    def row_map(self) -> RowMap | None:
        return None

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm | None:
        return None

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        inputs = inputs.replace(
            query=wide(inputs.query), key=wide(inputs.key), value=wide(inputs.value)
        )
        params = {name: wide(p) for name, p in params.items()}
        if inputs.observe is not None:
            return self._observed(inputs, params)
        past = Past(self.name, inputs)
        mixed = self.mix(inputs, params, past)
        past.close()
        return self.output(mixed, inputs, params)

    def _observed(self, inputs: Inputs, params: Params) -> Tensor:
        """Shows the weights, which are the output for one-hot values."""
        if inputs.state is not None:
            raise ValueError(
                f"{self.name} keeps no keys, so a call with a cache has no weights to show; run with use_cache=False"
            )
        keys = inputs.key.shape[2]
        one_hot = torch.eye(keys, dtype=inputs.value.dtype, device=inputs.value.device)
        one_hot = one_hot.expand(*inputs.value.shape[:2], keys, keys)
        past = Past(self.name, inputs.replace(form="quadratic"))
        weights = self.mix(inputs.replace(value=one_hot), params, past)
        whole = Block(
            slice(0, weights.shape[0]), slice(0, weights.shape[2]), slice(0, weights.shape[3])
        )
        assert inputs.observe is not None
        inputs.observe(inputs, whole, weights, past.keep())
        values = inputs.value.repeat_interleave(weights.shape[1] // inputs.value.shape[1], 1)
        return self.output(weights @ values, inputs, params)
