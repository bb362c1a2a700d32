"""Row maps on torch's flex_attention, for accelerators: `w = f(z) · c`, c one number a row, is `softmax(log f(z))`
times `c · exp(lse)`, lse being the log-sum-exp of `log f(z)`.

Checked against the query blocks on a CPU, forward and backward, in eager mode, which is not fused; **not run on a
GPU**. torch has no backward of flex_attention on a CPU, so CPUs keep the blocks; so do decoding steps (one query has
nothing to fuse), dropout, and models inside torch.compile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hf_softheads.attention.call import Call, Inputs, ScoreForm, ScoreMod, own_key, per_row

RANK = 30
TITLE = "flex_attention"
COMPILED = True
DEVICES = ("cuda", "xpu")
_SMALLEST = 16  # head dimension


def supports(call: Call) -> str | None:
    if not call.inputs.compiled:
        return "switched off"
    if call.inputs.query.device.type not in DEVICES:
        return "it is for accelerators"
    return inexpressible(call)


def inexpressible(call: Call) -> str | None:
    """Why flex_attention could compute this call on no device, or None."""
    inputs = call.inputs
    if inputs.query.shape[2] == 1:
        return "a single query has nothing to fuse"
    if inputs.query.shape[-1] < _SMALLEST:
        return f"heads are smaller than {_SMALLEST}"
    if inputs.value.dtype == torch.float64:
        return "it computes in fp32"
    if inputs.dropout:
        return "it has no dropout"
    if inputs.observe is not None:
        return "it shows no weights"
    if inputs.bias is not None and inputs.bias.requires_grad:
        return "it has no gradient of a bias"
    if torch.compiler.is_compiling():
        return "inside torch.compile"
    if call.spec.score_form(inputs, call.params) is None:
        return "the row map takes more than one pass"
    return None


def run(call: Call) -> Tensor:
    form = call.spec.score_form(call.inputs, call.params)
    assert form is not None
    return attend(call.inputs, form)


def attend(inputs: Inputs, form: ScoreForm) -> Tensor:
    """`(B, H, Q, Dv)` in the value's dtype."""
    torch_flex = _torch_flex()
    dtype = inputs.value.dtype
    query, key = inputs.query.to(dtype), inputs.key.to(dtype)
    run = _compiled() if query.device.type in DEVICES else torch_flex.flex_attention
    aux: Any = getattr(torch_flex, "AuxRequest", None)  # its name since torch 2.9
    out: Tensor
    out, found = run(
        query,
        key.contiguous(),
        inputs.value.contiguous(),
        score_mod=_score_mod(inputs, form),
        block_mask=_blocks(inputs),
        scale=inputs.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **({"return_lse": True} if aux is None else {"return_aux": aux(lse=True)}),
    )
    if form.factor is None:
        return out
    factor = form.factor(found if aux is None else found.lse)
    return out.mul(factor.unsqueeze(-1)).to(dtype)


def _score_mod(inputs: Inputs, form: ScoreForm) -> ScoreMod | None:
    slopes, log_weight, bias, cap = inputs.slopes, form.log_weight, inputs.bias, None
    if inputs.softcap is not None:
        cap = torch.tensor(inputs.softcap, device=inputs.query.device)  # a number: see _blocks
    if bias is not None:
        bias = bias.expand(*inputs.query.shape[:3], inputs.key.shape[2])
    own = None if slopes is None else per_row(inputs, own_key(inputs))
    if cap is None and bias is None and slopes is None and log_weight is None:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if cap is not None:
            score = torch.tanh(score / cap) * cap
        if bias is not None:
            score = score + bias[b, h, q, k]
        if slopes is not None and own is not None:
            score = score + slopes[h] * (own[b, h, q] - k)
        return score if log_weight is None else log_weight(score, b, h, q, k)

    return score_mod


def _blocks(inputs: Inputs) -> Any:
    """Which keys are seen. The causal ones are kept by shape; a mask of a call's own is looked at in every call."""
    queries, keys, device = inputs.query.shape[2], inputs.key.shape[2], inputs.query.device
    keep = inputs.keep
    if keep is None:
        return _causal(queries, keys, inputs.window, device)
    own = own_key(inputs).expand(*keep.shape[:3])
    window = torch.tensor(
        inputs.window or keys, device=device
    )  # numbers would each be compiled for
    many, each = keep.shape[0] > 1, keep.shape[1] > 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = (b if many else 0 * b), (h if each else 0 * h)
        return keep[b, h, q, k] & (own[b, h, q] - k < window)

    return _torch_flex().create_block_mask(
        mask_mod,
        keep.shape[0] if many else None,
        keep.shape[1] if each else None,
        queries,
        keys,
        device=device,
    )


@functools.lru_cache(maxsize=16)
def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Any:
    with torch.inference_mode(False):  # kept, and then used where gradients are wanted
        offset = torch.tensor(keys - queries, device=device)
        reach = torch.tensor(window or keys, device=device)

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = q + offset - k
            return (distance >= 0) & (distance < reach)

        make = _torch_flex().create_block_mask
        return make(mask_mod, None, None, queries, keys, device=device)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_torch_flex().flex_attention)


def _torch_flex() -> Any:
    from torch.nn.attention import flex_attention  # loads torch's compiler in some versions

    return flex_attention
