"""The log-n trick: sharpen the softmax beyond the training length, leave it alone up to there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Params


@dataclass(frozen=True)
class LogN(AttentionSpec, name="log_n"):
    """`softmax(max(1, log(n) / log(L)) · z)`, n the number of keys that the row sees, L the training length

    Source: Su Jianlin, 2021 (kexue.fm/archives/8823); Qwen's `use_logn_attn`.

    Args:
        length: L; rows that see at most L keys are left exactly as they are.
    """

    length: int = 2048
    training_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length must be at least 2 (log 1 is 0), got {self.length}")

    def scale_queries(
        self, query: Tensor, n_keys: Tensor, params: Params, hidden: Tensor | None
    ) -> Tensor:
        return query * (n_keys.to(query.dtype).log() / math.log(self.length)).clamp(min=1)
