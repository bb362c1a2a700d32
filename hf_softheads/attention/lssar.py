"""Re-weighted length-scaled softplus attention: keys below the row's average get nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_softheads.attention.call import Inputs, Params, RowMap
from hf_softheads.attention.lssa import LSSA
from hf_softheads.registry import Positive


@dataclass(frozen=True)
class LSSAR(LSSA, name="lssar"):
    """`r = relu(w · n - O)^p`, `w_r = r / (Σ r + ε)`, w the weights of `lssa`, `O = 1`, or 0 for rows of up to 3 keys

    Source: arXiv:2501.13428. A row of equal scores is 0: no key is above the average.

    Args:
        p: power; 15 for long contexts, 3 is best at 1,024 tokens.
    """

    p: Positive = 15.0
    sums_to_one: ClassVar[bool] = False
    exact_zeros: ClassVar[bool] = True

    def row_map(self) -> RowMap:
        return RowMap("reweighted", (self.p, 2.0, self.eps))

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        n = keep.sum(-1, keepdim=True).to(scores.dtype)
        above = (super().weights(scores, keep, params) * n - (n > 3).to(scores.dtype)).relu()
        # The row's largest value goes to 1 before the power, which overflows fp32 at n = 400, p = 15; ε moves along.
        top = above.detach().amax(-1, keepdim=True)
        scale = top.masked_fill(top == 0, 1)
        powered = (above / scale) ** self.p
        return powered / (powered.sum(-1, keepdim=True) + self.eps * scale**-self.p)

    def score_form(self, inputs: Inputs, params: Params) -> None:
        return None  # the power is of normalised weights: a second pass
