"""Scalable softmax: a learnable temperature that grows with the logarithm of the context."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, per_head
from hf_softheads.attention.call import Geometry, Params
from hf_softheads.registry import Bounds


@dataclass(frozen=True)
class SSMax(AttentionSpec, name="ssmax"):
    """`softmax(s_h · log(n) · z)`, n the number of keys that the row sees

    Source: arXiv:2501.19399, eq. 3. With `bias` the factor is `s_h · log(n) + b_h` and starts as 1 for every n: the
    identity. Without it `s` starts as `1 / log(reference_length)`, the identity for rows that see
    `reference_length` keys and no others.

    Args:
        bias: learn an offset too (the paper: better training loss, worse length generalisation). None: as a function,
            no; in a pretrained model, yes, since only then it starts as what it was.
        reference_length: where the factor starts as 1 without `bias`; the paper's 0.168 is about 380 keys.
    """

    reference_length: Annotated[int, Bounds(at_least=2, hint="log 1 is 0")] = 380
    bias: bool | None = None

    @property
    def training_free(self) -> bool:  # type: ignore[override]
        return bool(self.bias)

    def for_pretrained(self) -> SSMax:
        return replace(self, bias=True) if self.bias is None else self

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """`s (H,)` and, with `bias`, `b (H,)`."""
        ones = torch.ones(geometry.heads)
        if self.bias:
            return {"s": 0 * ones, "b": ones}
        return {"s": ones / math.log(self.reference_length)}

    def scale_queries(
        self, query: Tensor, n_keys: Tensor, params: Params, hidden: Tensor | None
    ) -> Tensor:
        factor = per_head(params["s"]) * n_keys.to(query.dtype).log()
        if self.bias:
            factor = factor + per_head(params["b"])
        return query * factor
