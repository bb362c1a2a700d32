"""Row maps on torch's flex_attention, for accelerators: `w = f(z) · c`, c one number a row, is `softmax(log f(z))`
times `c · exp(lse)`, lse being the log-sum-exp of `log f(z)`.

Checked against the query blocks on a CPU, forward and backward, in eager mode, which is not fused; **not run on a
GPU**. torch has no backward of flex_attention on a CPU, so CPUs keep the blocks; so do decoding steps (one query has
nothing to fuse), dropout, and models inside torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

if TYPE_CHECKING:
    from hf_softheads.attention.base import AttentionSpec, Inputs

DEVICES = ("cuda", "xpu")
_SMALLEST = 16  # head dimension

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A row map for flex_attention.

    Attributes:
        log_weight: `log f` of a score, given it and its sample, head, query and key; None: the score itself.
        factor: what the output is multiplied by, `(B, H, Q)`, from the log-sum-exp `(B, H, Q)`; None: 1.
    """

    log_weight: ScoreMod | None = None
    factor: Callable[[Tensor], Tensor] | None = None


def possible(inputs: Inputs) -> bool:
    """Is this a call that flex_attention should serve?"""
    return inputs.compiled and inputs.query.device.type in DEVICES and expressible(inputs)


def expressible(inputs: Inputs) -> bool:
    """Can flex_attention compute this call on any device?"""
    return (
        inputs.query.shape[2] > 1
        and inputs.query.shape[-1] >= _SMALLEST
        and inputs.value.dtype != torch.float64
        and not inputs.dropout
        and inputs.observe is None
        and not (inputs.bias is not None and inputs.bias.requires_grad)
        and not torch.compiler.is_compiling()
    )


def has_form(spec: AttentionSpec) -> bool:
    """Has this variant, in these settings, a form?"""
    from hf_softheads.attention.base import Geometry, Inputs

    query = torch.zeros(1, 2, 2, 8)
    params = spec.init_params(Geometry(heads=2, kv_heads=2, head_dim=8, hidden_size=8))
    return spec.flex_form(Inputs(query, query, query, None, 1.0), params) is not None


def path(spec: AttentionSpec) -> str:
    """How a layer with this variant runs on an accelerator, for `describe`."""
    if not spec._overrides("weights"):
        return "scaled_dot_product_attention; flex_attention with soft caps and windows"
    if has_form(spec):
        return "flex_attention; query blocks when decoding, compiled or with dropout"
    return "query blocks: flex_attention cannot express this row map in one pass"


def attend(inputs: Inputs, form: Form) -> Tensor:
    """`(B, H, Q, Dv)` in the value's dtype."""
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


def visible(inputs: Inputs) -> Tensor:
    """How many keys each query sees, window included, `(1|B, 1|H, Q)` float32, at least 1."""
    seen = inputs.n_keys().squeeze(-1)
    if inputs.window is not None and inputs.keep is None:
        seen = seen.clamp(max=inputs.window)
    elif inputs.window is not None and inputs.keep is not None:
        distance = _own(inputs).unsqueeze(-1) - torch.arange(
            inputs.key.shape[2], device=seen.device
        )
        seen = (inputs.keep & (distance < inputs.window)).sum(-1)
    return seen.clamp(min=1).float()


def rows(inputs: Inputs, values: Tensor) -> Tensor:
    """`(1|B, 1|H, Q)` as a `(B, H, Q)` view that a `log_weight` can index."""
    return values.expand(*inputs.query.shape[:3])


def _own(inputs: Inputs) -> Tensor:
    """Index of each query's own key, `(1|B, 1|H, Q)`."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    if inputs.causal and inputs.keep is not None:
        return keys - 1 - inputs.keep.int().flip(-1).argmax(-1)
    return torch.arange(keys - queries, keys, device=inputs.query.device).view(1, 1, -1)


def _score_mod(inputs: Inputs, form: Form) -> ScoreMod | None:
    slopes, log_weight, bias, cap = inputs.slopes, form.log_weight, inputs.bias, None
    if inputs.softcap is not None:
        cap = torch.tensor(inputs.softcap, device=inputs.query.device)  # a number: see _blocks
    if bias is not None:
        bias = bias.expand(*inputs.query.shape[:3], inputs.key.shape[2])
    own = None if slopes is None else rows(inputs, _own(inputs))
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
    own = _own(inputs).expand(*keep.shape[:3])
    window = torch.tensor(
        inputs.window or keys, device=device
    )  # numbers would each be compiled for
    many, each = keep.shape[0] > 1, keep.shape[1] > 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = (b if many else 0 * b), (h if each else 0 * h)
        return keep[b, h, q, k] & (own[b, h, q] - k < window)

    return torch_flex.create_block_mask(
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

        return torch_flex.create_block_mask(mask_mod, None, None, queries, keys, device=device)


@functools.cache
def _compiled() -> Any:
    return torch.compile(torch_flex.flex_attention)
