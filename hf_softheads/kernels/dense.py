"""Scores of some tokens from the rows of a bf16 matrix, where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_softheads.kernels import call, load


@torch.library.custom_op(
    "softheads::dense_score",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor weight, Tensor hidden, Tensor tokens, *, str instructions='native') -> Tensor",
)
def dense_score(
    weight: Tensor, hidden: Tensor, tokens: Tensor, *, instructions: str = "native"
) -> Tensor:
    """`weight[tokens] @ hidden` with products and sums in fp32, `(B, M)` fp32.

    Args:
        weight: `(V, D)` bf16, contiguous; hidden: `(B, D)`; tokens: `(B, M)` int64, in `[0, V)`.
    """
    states, tokens = hidden.float().contiguous(), tokens.contiguous()
    out = torch.empty(tokens.shape)
    function = load("dense", instructions).dense_score
    call(function, weight, weight.shape[1], tokens, tokens.shape[1], states, len(states), out)
    return out


@dense_score.register_fake
def _(weight: Tensor, hidden: Tensor, tokens: Tensor, **rest: Any) -> Tensor:
    return hidden.new_empty(tokens.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    weight, hidden, tokens = ctx.saved_tensors
    rows = dstates = None
    if ctx.needs_input_grad[0]:
        products = grad.unsqueeze(-1) * hidden.unsqueeze(1).float()
        rows = torch.zeros_like(weight).index_put(
            (tokens,), products.to(weight.dtype), accumulate=True
        )
    if ctx.needs_input_grad[1]:
        dstates = (grad.unsqueeze(1) @ weight[tokens].float()).squeeze(1).to(hidden.dtype)
    return rows, dstates, None


dense_score.register_autograd(_differentiate, setup_context=_save)
