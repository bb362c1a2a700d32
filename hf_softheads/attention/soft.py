"""SOFT: a Gaussian kernel of queries alone, by a few landmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Block, Inputs, Params, RowMap, ScoreForm, wide
from hf_softheads.attention.engines import Choice
from hf_softheads.registry import Count


@dataclass(frozen=True)
class Soft(AttentionSpec, name="soft"):
    """`A_ij = exp(−‖q̂_i − q̂_j‖² / 2)`, `q̂ = √scaling · q`, as `C (W + 0.01)⁻¹ Cᵀ` of landmarks; encoders only

    Source: arXiv:2110.11945. Keys are the queries. Landmarks are means of stretches of the text, later tokens included,
    so that no language model that reads from left to right can have it. Rows are not divided by their sum. C is the
    kernel between tokens and landmarks, W that among landmarks; a text of no more tokens than landmarks is computed
    whole.

    Args:
        landmarks: how many.
    """

    landmarks: Count = 49
    sums_to_one: ClassVar[bool] = False
    decode_safe: ClassVar[bool] = False
    sinks: ClassVar[bool] = False

    def row_map(self) -> RowMap | None:
        return None

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm | None:
        return None

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        if inputs.trace is not None:
            inputs.trace(Choice(_Landmarks, ()))
        elif inputs.causal or inputs.keep is None:
            raise ValueError(
                "soft is for encoders: its landmarks are means over the whole text, so in a causal model every token "
                "would see later ones, and its keys are the queries, which no cache holds. hedgehog, performer or "
                "learned_kernel are linear in the length of the text and causal"
            )
        if inputs.dropout:
            raise ValueError("soft has no dropout; set the model's attention dropout to 0")
        query = wide(inputs.query) * inputs.scaling**0.5
        real = _real(inputs, query)
        value = wide(inputs.value)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1) * real
        if inputs.observe is not None or query.shape[2] <= self.landmarks:
            return self._whole(inputs, query, value, real)
        marks = _means(query, real, self.landmarks)
        tokens, among = _kernel(query, marks) * real, _kernel(marks, marks)
        among = among + 0.01 * torch.eye(self.landmarks, dtype=among.dtype, device=among.device)
        out: Tensor = tokens @ torch.linalg.solve(among, tokens.mT @ value)
        return out

    def _whole(self, inputs: Inputs, query: Tensor, value: Tensor, real: Tensor) -> Tensor:
        weights = _kernel(query, query) * real * real.mT
        if inputs.observe is not None:
            every = [slice(0, n) for n in (weights.shape[0], *weights.shape[2:])]
            inputs.observe(inputs, Block(*every), weights, (real * real.mT) > 0)
        return weights @ value


class _Landmarks:
    TITLE = "landmarks"
    COMPILED = False


def _real(inputs: Inputs, query: Tensor) -> Tensor:
    """1 for tokens that any query sees, 0 for padding, `(1|B, 1, T, 1)`."""
    if inputs.keep is None:
        return query.new_ones(1, 1, query.shape[2], 1)
    return inputs.keep.any(-2, keepdim=True).any(1, keepdim=True).mT.to(query)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1, keepdim=True).mT
    distance: Tensor = (squares - 2 * x @ y.mT).clamp(min=0)
    return (-distance / 2).exp()


def _means(query: Tensor, real: Tensor, landmarks: int) -> Tensor:
    """Means of as many stretches of the tokens that are no padding, `(B, H, landmarks, D)`."""
    place = real.cumsum(2) - 1
    stretch = (place * landmarks / real.sum(2, keepdim=True).clamp(min=1)).floor()
    member = (stretch == torch.arange(landmarks, device=query.device)).to(query) * real
    return member.mT @ query / member.sum(2).unsqueeze(-1).clamp(min=1)
