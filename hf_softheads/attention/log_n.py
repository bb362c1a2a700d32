"""The log-n trick: sharpen the softmax beyond the training length, leave it alone up to there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Params
from hf_softheads.registry import Bounds


@dataclass(frozen=True)
class LogN(AttentionSpec, name="log_n"):
    """`softmax(max(1, log(n) / log(L)) · z)`, n the number of keys that the row sees, L the training length

    Source: Su Jianlin, 2021 (kexue.fm/archives/8823); Qwen's `use_logn_attn`.

    Args:
        length: L; rows that see at most L keys are left exactly as they are.
    """

    length: Annotated[int, Bounds(at_least=2, hint="log 1 is 0")] = 2048
    training_free: ClassVar[bool] = True

    def scale_queries(
        self, query: Tensor, n_keys: Tensor, params: Params, hidden: Tensor | None
    ) -> Tensor:
        return query * (n_keys.to(query.dtype).log() / math.log(self.length)).clamp(min=1)
