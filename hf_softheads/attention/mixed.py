"""A per-head mixture of the softmax and any other variant: the road from one to the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, Geometry, Inputs, Params, per_head
from hf_softheads.attention.softmax import Softmax
from hf_softheads.attention.softpick import Softpick


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

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`gate (H,)`, and the other variant's parameters as `other_<name>`."""
        others = {f"other_{n}": p for n, p in self.other.init_params(geometry).items()}
        return {"gate": torch.full((geometry.heads,), self.start), **others}

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        others = {n.removeprefix("other_"): p for n, p in params.items() if n != "gate"}
        gate = per_head(params["gate"])
        softmax = Softmax().forward(inputs, {})
        return softmax + gate * (self.other.forward(inputs, others) - softmax)

    def path(self) -> str:
        return f"{Softmax().path()}, and {self.other.path()}"
