"""A per-head mixture of the softmax and any other variant: the road from one to the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, per_head
from hf_softheads.attention.call import Block, Geometry, Inputs, Params
from hf_softheads.attention.softmax import Softmax
from hf_softheads.attention.softpick import Softpick

_SOFTMAX = Softmax()  # made once: its fields are checked, which has no place in a compiled forward


@dataclass(frozen=True)
class Mixed(AttentionSpec, name="mixed"):
    """`(1 - g_h) · softmax + g_h · other`, g one learned number per head that starts at `start`

    Source: this project. At g = 0 the model is the pretrained one and every gate has a gradient; train with a growing
    penalty on `1 - g`, then patch with `other` alone.

    Args:
        other: the variant to convert to.
        start: g at the start.
    """

    other: AttentionSpec = field(default_factory=Softpick)
    start: float = 0.0
    sums_to_one: ClassVar[bool] = False
    training_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.other, Mixed):
            raise ValueError("mixed(other=mixed(…)) has two gates for one mixture; nest nothing")

    @property
    def needs_hidden(self) -> bool:  # type: ignore[override]
        return self.other.needs_hidden

    @property
    def decode_safe(self) -> bool:  # type: ignore[override]
        return self.other.decode_safe

    def for_pretrained(self) -> Mixed:
        return replace(self, other=self.other.for_pretrained())

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`gate (H,)`, and the other variant's parameters as `other_<name>`."""
        others = {f"other_{n}": p for n, p in self.other.init_params(geometry).items()}
        return {"gate": torch.full((geometry.heads,), float(self.start)), **others}

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        others = self._others(params)
        gate = per_head(params["gate"])
        if inputs.observe is not None:
            return self._observed(inputs, others, gate)
        softmax = _SOFTMAX.forward(inputs, {})
        return softmax + gate * (self.other.forward(inputs, others) - softmax)

    def _others(self, params: Params) -> Params:
        return {n.removeprefix("other_"): p for n, p in params.items() if n != "gate"}

    def _observed(self, inputs: Inputs, others: Params, gate: Tensor) -> Tensor:
        """Shows the sum of both maps, for which one of them is held whole."""
        first = torch.zeros(*inputs.query.shape[:3], inputs.key.shape[2], device=gate.device)
        kept = torch.zeros_like(first, dtype=torch.bool)

        def hold(_: Inputs, block: Block, weights: Tensor, keep: Tensor) -> None:
            where = (block.batch, slice(None), block.rows, block.columns)
            first[where], kept[where] = weights.to(first.dtype), keep

        def show(_: Inputs, block: Block, weights: Tensor, keep: Tensor) -> None:
            second = torch.zeros_like(first[block.batch, :, block.rows])
            second[..., block.columns] = weights.to(first.dtype)
            both = torch.lerp(first[block.batch, :, block.rows], second, gate.float())
            if inputs.observe is not None:
                whole = Block(block.batch, block.rows, slice(0, first.shape[-1]))
                inputs.observe(inputs, whole, both, kept[block.batch, :, block.rows])

        softmax = _SOFTMAX.forward(inputs.replace(observe=hold), {})
        return softmax + gate * (self.other.forward(inputs.replace(observe=show), others) - softmax)
