"""Softmax attention on torch's scaled_dot_product_attention, with or without one more key per head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_softheads.attention.call import SOFTMAX, Call, Inputs, wide

RANK = 20
TITLE = "scaled_dot_product_attention"
COMPILED = False


def supports(call: Call) -> str | None:
    inputs = call.inputs
    sinks = call.spec.sink_logits(inputs, call.params) is not None
    if not sinks and call.spec.row_map() != SOFTMAX:
        return "the row map is no softmax"
    for name, asked in (
        ("soft cap", inputs.softcap),
        ("slopes", inputs.slopes),
        ("window", inputs.window),
    ):
        if asked is not None:
            return f"it has no {name}"
    if inputs.observe is not None:
        return "it shows no weights"
    return _no_sinks(inputs) if sinks else None


def run(call: Call) -> Tensor:
    sinks = call.spec.sink_logits(call.inputs, call.params)
    return attend(call.inputs) if sinks is None else attend_with_sinks(call.inputs, sinks)


def attend(inputs: Inputs) -> Tensor:
    """`softmax(query @ key.mT * scaling) @ value`, `(B, H, Q, Dv)`; in the key's dtype on an accelerator."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if query.device.type == "cpu":  # no slower than in half precision, and rounded only once
        query, key, value = wide(query), wide(key), wide(value)
    else:
        query = query.to(key.dtype)
    mask, causal = _mask(inputs)
    out: Tensor = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=inputs.dropout,
        is_causal=causal,
        scale=inputs.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


def _mask(inputs: Inputs) -> tuple[Tensor | None, bool]:
    """The kernel's mask argument and its causal flag; the flag alone halves the work, so it is looked for."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    keep = inputs.keep
    if inputs.bias is None and queries == keys and (keep is None or _is_causal(keep)):
        return None, queries > 1
    if keep is None and queries == 1:
        return inputs.bias, False
    if keep is None:
        keep = torch.ones(queries, keys, dtype=torch.bool, device=inputs.query.device)
        keep = keep.tril(keys - queries)
    if inputs.bias is not None:
        return inputs.bias.to(inputs.query.dtype).masked_fill(~keep, -torch.inf), False
    return keep, False


def _is_causal(keep: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # a question about values would break the graph
    causal = torch.ones(keep.shape[-2:], dtype=torch.bool, device=keep.device).tril()
    return torch.equal(keep, causal.expand_as(keep))


# -- softmax with one more key per head, of score `sinks[h]` and value 0 ---------------------------------------------


def _no_sinks(inputs: Inputs) -> str | None:
    """Why torch's flash kernel cannot give the log-sum-exp that sinks need; it does on a CPU, in eager mode."""
    if inputs.query.device.type != "cpu":
        return "sinks need the log-sum-exp of its flash kernel, which a CPU gives"
    if inputs.bias is not None or inputs.dropout:
        return "sinks with a bias or dropout"
    if inputs.query.shape[-1] != inputs.value.shape[-1]:
        return "sinks with values of another size than keys"
    return "sinks inside torch.compile" if torch.compiler.is_compiling() else None


def attend_with_sinks(inputs: Inputs, sinks: Tensor) -> Tensor:
    """`softmax([z, sinks])[..., :-1] @ value`, as `softmax(z) @ value · σ(lse(z) - sinks)`."""
    mask, causal = _mask(inputs)
    additive = None
    if mask is not None:
        additive = torch.zeros(mask.shape, dtype=wide(inputs.query).dtype).masked_fill_(
            ~mask, -torch.inf
        )
    query, key, value = wide(inputs.query), wide(inputs.key), wide(inputs.value)
    out: Tensor = _WithSinks.apply(query, key, value, sinks, additive, causal, inputs.scaling)
    return out


class _WithSinks(torch.autograd.Function):
    """The flash backward recomputes `p = exp(z - lse)` and `δ = Σ out · grad`: given the log-sum-exp and the output of
    the softmax *with* the sink it computes that softmax's gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        raw, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        logit = sinks.to(lse.dtype).view(1, -1, 1)
        out: Tensor = (raw * (lse - logit).sigmoid().unsqueeze(-1)).to(raw.dtype)
        lse = torch.logaddexp(lse, logit)
        ctx.save_for_backward(query, key, value, sinks, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, sinks, mask, out, lse = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        inner = (out * grad).sum(-1, dtype=lse.dtype)
        taken = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp()
        dsinks = -(inner * taken).sum((0, 2)).to(sinks.dtype)
        return *grads, dsinks, None, None, None
