"""Attention with any row map, over blocks of queries: memory O(Q + K) per head, recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hf_softheads.attention.call import Block, Call, Inputs, Params, RowMapper

RANK = 100
TITLE = "query blocks"
COMPILED = False

_ROWS = 64  # queries of one block
_SCORES = 2**21  # scores of one block: 8 MiB in fp32, so that every pass over them stays in cache


def supports(call: Call) -> str | None:
    return None


def run(call: Call) -> Tensor:
    return attend(call.spec, call.inputs, call.params)


def attend(spec: RowMapper, inputs: Inputs, params: Params) -> Tensor:
    """`spec.weights(scores) @ value`, `(B, H, Q, Dv)` in fp32 (float64 for float64 inputs)."""
    inputs = _widened(inputs)
    if torch.compiler.is_compiling():
        return _traceable(spec, inputs, params)
    if inputs.observe is not None:
        return _observed(spec, inputs, params)
    names = tuple(params)
    tensors = (inputs.query, inputs.key, inputs.value, inputs.bias, inputs.slopes)
    rest = inputs.replace(query=None, key=None, value=None, bias=None, slopes=None, hidden=None)
    out: Tensor = _Blocked.apply(spec, rest, names, *tensors, *params.values())
    return out


def whole(spec: RowMapper, inputs: Inputs, params: Params) -> Tensor:
    """The same by one `(B, H, Q, K)` matrix and autograd: the definition that the blocks are tested against."""
    inputs = _widened(inputs)
    rows, columns = slice(0, inputs.query.shape[2]), slice(0, inputs.key.shape[2])
    block = Block(slice(0, inputs.query.shape[0]), rows, columns)
    group = inputs.query.shape[1] // inputs.key.shape[1]
    key = inputs.key.repeat_interleave(group, 1)
    value = inputs.value.repeat_interleave(group, 1)
    raw = inputs.query @ key.mT * inputs.scaling
    scores = _finished(inputs, block, _capped(inputs, raw))
    return spec.weights(scores, _kept(inputs, block), params) @ value


def _observed(spec: RowMapper, inputs: Inputs, params: Params) -> Tensor:
    query, value = inputs.query, inputs.value
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for block in _blocks(inputs):
        keep = _kept(inputs, block)
        scores = _finished(inputs, block, _capped(inputs, _raw(inputs, block)))
        weights = spec.weights(scores, keep, params)
        out[block.batch, :, block.rows] = _times(weights, value[block.batch, :, block.columns])
        if inputs.observe is not None:
            inputs.observe(inputs, block, weights, keep)
    return out


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: RowMapper, rest: Inputs, names: Any, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.spec, ctx.rest, ctx.names = spec, rest, names
        inputs, params = _unpack(rest, names, tensors)
        query, value = inputs.query, inputs.value
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        ctx.blocks = list(_blocks(inputs))
        ctx.seed = int(torch.randint(2**62, ())) if inputs.dropout else 0
        for block in ctx.blocks:
            scores = _finished(inputs, block, _capped(inputs, _raw(inputs, block)))
            weights = spec.weights(scores, _kept(inputs, block), params)
            if inputs.dropout:
                weights = block.dropped(weights, inputs, ctx.seed)
            out[block.batch, :, block.rows] = _times(weights, value[block.batch, :, block.columns])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, params = _unpack(ctx.rest, ctx.names, ctx.saved_tensors)
        needs = ctx.needs_input_grad[3:]
        params = {
            name: p.detach().requires_grad_(need)
            for (name, p), need in zip(params.items(), needs[5:], strict=True)
        }
        query, key, value = inputs.query, inputs.key, inputs.value
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        dbias = None if inputs.bias is None or not needs[3] else torch.zeros_like(inputs.bias)
        trained = inputs.slopes if needs[4] else None
        dslopes = None if trained is None else torch.zeros_like(trained)
        dparams = {n: torch.zeros_like(p) for n, p in params.items() if p.requires_grad}
        with torch.autocast(query.device.type, enabled=False):
            for block in ctx.blocks:
                batch, rows, columns = block.batch, block.rows, block.columns
                out_grad = grad[batch, :, rows]
                capped = _capped(inputs, _raw(inputs, block))
                scores = _finished(inputs, block, capped)
                dweights = _times(out_grad, value[batch, :, columns].mT)
                if inputs.dropout:
                    dweights = block.dropped(dweights, inputs, ctx.seed)
                keep = _kept(inputs, block)
                weights, dscores, by_name = ctx.spec.weights_vjp(scores, keep, params, dweights)
                if inputs.dropout:
                    weights = block.dropped(weights, inputs, ctx.seed)
                for name, gradient in by_name.items():
                    dparams[name] += gradient
                if dbias is not None:
                    part = _bias_part(dbias, block)
                    part += dscores.sum_to_size(part.shape)
                if dslopes is not None:
                    dslopes += (dscores * _distance(inputs, block)).sum((0, 2, 3))
                if inputs.softcap is not None:
                    dscores = dscores * (1 - (capped / inputs.softcap).square())
                dv[batch, :, columns] += _transposed_times(weights, out_grad, value.shape[1])
                dscores = dscores * inputs.scaling
                dq[batch, :, rows] = _times(dscores, key[batch, :, columns])
                dk[batch, :, columns] += _transposed_times(
                    dscores, query[batch, :, rows], key.shape[1]
                )
        return (None, None, None, dq, dk, dv, dbias, dslopes, *(dparams.get(n) for n in params))


def _traceable(spec: RowMapper, inputs: Inputs, params: Params) -> Tensor:
    """The same blocks for torch.compile: plain operations, checkpointed instead of a hand-written backward."""

    def one(block: Block, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        part = inputs.replace(query=query, key=key, value=value)
        scores = _finished(part, block, _capped(part, _raw(part, block)))
        weights = spec.weights(scores, _kept(part, block), params)
        weights = torch.dropout(weights, inputs.dropout, True)
        return _times(weights, value[block.batch, :, block.columns])

    arguments = (inputs.query, inputs.key, inputs.value)
    parts = []
    every = slice(0, inputs.query.shape[0])
    for rows, columns in zip(_rows(inputs.query.shape[2]), _columns(inputs, every), strict=True):
        block = Block(every, rows, columns)
        if torch.is_grad_enabled():
            parts.append(checkpoint(one, block, *arguments, use_reentrant=False))
        else:
            parts.append(one(block, *arguments))
    return torch.cat(parts, 2)


def _widened(inputs: Inputs) -> Inputs:
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    return inputs.replace(
        query=inputs.query.to(dtype),
        key=inputs.key.to(dtype).contiguous(),
        value=inputs.value.to(dtype).contiguous(),
    )


def _unpack(rest: Inputs, names: Any, tensors: Any) -> tuple[Inputs, dict[str, Tensor]]:
    query, key, value, bias, slopes = tensors[:5]
    inputs = rest.replace(query=query, key=key, value=value, bias=bias, slopes=slopes)
    return inputs, dict(zip(names, tensors[5:], strict=True))


def _blocks(inputs: Inputs) -> Iterator[Block]:
    batch, heads, queries, _ = inputs.query.shape
    samples = max(1, _SCORES // (heads * min(_ROWS, queries) * inputs.key.shape[2]))
    for start in range(0, batch, samples):
        chosen = slice(start, min(start + samples, batch))
        for rows, columns in zip(_rows(queries), _columns(inputs, chosen), strict=True):
            yield Block(chosen, rows, columns)


def _rows(queries: int) -> list[slice]:
    return [slice(i, min(i + _ROWS, queries)) for i in range(0, queries, _ROWS)]


def _columns(inputs: Inputs, batch: slice) -> list[slice]:
    """The range of keys that any query of a block sees, for each block of queries."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    if inputs.keep is None:
        offset = keys - queries
        reach = keys if inputs.window is None else inputs.window
        return [
            slice(max(0, rows.start + offset + 1 - reach), rows.stop + offset)
            for rows in _rows(queries)
        ]
    if torch.compiler.is_compiling() or queries == 1:
        return [slice(0, keys) for _ in _rows(queries)]
    keep = inputs.keep if inputs.keep.shape[0] == 1 else inputs.keep[batch]
    seen = torch.stack([keep[:, :, rows].flatten(0, 2).any(0) for rows in _rows(queries)]).int()
    first, last = seen.argmax(-1), keys - 1 - seen.flip(-1).argmax(-1)
    last = torch.where(seen.any(-1), last, first)  # one key keeps row maps free of empty reductions
    return [slice(i, j + 1) for i, j in torch.stack([first, last], 1).tolist()]


def _raw(inputs: Inputs, block: Block) -> Tensor:
    query = inputs.query[block.batch, :, block.rows] * inputs.scaling
    return _times(query, inputs.key[block.batch, :, block.columns].mT)


def _capped(inputs: Inputs, scores: Tensor) -> Tensor:
    if inputs.softcap is None:
        return scores
    return (scores / inputs.softcap).tanh() * inputs.softcap


def _finished(inputs: Inputs, block: Block, scores: Tensor) -> Tensor:
    if inputs.bias is not None:
        scores = scores + _bias_part(inputs.bias, block)
    if inputs.slopes is not None:
        scores = scores + inputs.slopes.view(1, -1, 1, 1) * _distance(inputs, block)
    return scores


def _bias_part(bias: Tensor, block: Block) -> Tensor:
    bias = bias[(None,) * (4 - bias.ndim)]
    wanted = (block.batch, slice(None), block.rows, block.columns)
    return bias[tuple(w if n > 1 else slice(None) for w, n in zip(wanted, bias.shape, strict=True))]


def _kept(inputs: Inputs, block: Block) -> Tensor:
    """The block's mask, bool, broadcastable to its scores."""
    if inputs.keep is not None:
        keep = inputs.keep if inputs.keep.shape[0] == 1 else inputs.keep[block.batch]
        keep = keep[:, :, block.rows, block.columns]
        return keep if inputs.window is None else keep & (_distance(inputs, block) < inputs.window)
    distance = _distance(inputs, block)
    keep = distance >= 0
    return keep if inputs.window is None else keep & (distance < inputs.window)


def _distance(inputs: Inputs, block: Block) -> Tensor:
    """Index of each query's own key minus the key's index, `(…, Q, K)` of the block."""
    queries, keys = inputs.query.shape[2], inputs.key.shape[2]
    device = inputs.query.device
    if inputs.causal and inputs.keep is not None:
        keep = inputs.keep if inputs.keep.shape[0] == 1 else inputs.keep[block.batch]
        seen = keep[:, :, block.rows].int()
        own = keys - 1 - seen.flip(-1).argmax(-1, keepdim=True)
    else:
        own = torch.arange(block.rows.start, block.rows.stop, device=device) + (keys - queries)
        own = own.view(1, 1, -1, 1)
    return own - torch.arange(block.columns.start, block.columns.stop, device=device)


def _times(rows: Tensor, columns: Tensor) -> Tensor:
    """`(B, H, Q, X) @ (B, Hkv, X, Y)`; the query heads of a group are stacked as rows, so nothing is repeated."""
    batch, heads, queries, _ = rows.shape
    kv_heads = columns.shape[1]
    if heads == kv_heads:
        return rows @ columns
    stacked = rows.reshape(batch, kv_heads, heads // kv_heads * queries, -1)
    return (stacked @ columns).reshape(batch, heads, queries, -1)


def _transposed_times(left: Tensor, right: Tensor, kv_heads: int) -> Tensor:
    """`(B, H, Q, X)ᵀ (B, H, Q, Y)` summed over each group: `(B, Hkv, X, Y)`."""
    batch, heads, queries, _ = left.shape
    stacked = heads // kv_heads * queries
    left = left.reshape(batch, kv_heads, stacked, -1)
    return left.mT @ right.reshape(batch, kv_heads, stacked, -1)
