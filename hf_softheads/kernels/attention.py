"""Attention with a row map of the C++ kernel, and its gradients, as operators that autograd and torch.compile know."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_softheads.kernels import KernelUnavailable, load

_POINTERS = (
    *("query", "key", "value", "keep", "slopes", "constants"),
    *("out", "grad", "dquery", "dkey", "dvalue"),
)
_SIZES = ("batch", "heads", "kv_heads", "queries", "keys", "dim", "value_dim")
_STRIDES = {"query_strides": 3, "key_strides": 3, "value_strides": 3, "keep_strides": 4}
_NUMBERS = ("map", "half", "window", "causal", "threads")


class _Call(ctypes.Structure):  # mirrors `struct Call` in attention_blocks.hpp
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int64 * length) for name, length in _STRIDES.items()),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


@torch.library.custom_op("softheads::attention", mutates_args=(), device_types="cpu")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    slopes: Tensor | None,
    row_map: str,
    constants: Sequence[float],
    scaling: float,
    softcap: float,
    window: int,
    causal: bool,
) -> Tensor:
    """`weights(scaling · query @ key.mT) @ value`, `(B, H, Q, Dv)` fp32.

    Args:
        query: `(B, H, Q, D)`, fp32, bf16 or fp16 like key and value `(B, Hkv, K, …)`. Products of bf16 numbers are
            exact, sums fp32.
        keep: bool `(1|B, 1|H, Q, K)`; None: causal, the last query sees all keys.
        slopes, window, causal: see `hf_softheads.attention.base.Inputs`; window 0: none.
        row_map: a name in `MAPS` of attention_blocks.hpp; constants: what it takes.
        softcap: 0 for none.
    """
    library = load("attention")
    half = bool(library.attention_half()) and all(
        x.dtype == torch.bfloat16 for x in (query, key, value)
    )
    dtype = torch.bfloat16 if half else torch.float32
    shape = (*query.shape[:3], value.shape[3])
    call, held = _call(query, key, value, keep, slopes, row_map, constants, dtype)
    call.scaling, call.softcap, call.window, call.causal = scaling, softcap, window, causal
    call.half = half
    out = torch.empty(shape, dtype=torch.float32)
    call.out = out.data_ptr()
    library.attention_forward(ctypes.byref(call))
    del held
    return out


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3], dtype=torch.float32)


@torch.library.custom_op("softheads::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    slopes: Tensor | None,
    row_map: str,
    constants: Sequence[float],
    scaling: float,
    softcap: float,
    window: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in their dtypes; all products and sums are fp32."""
    call, held = _call(query, key, value, keep, slopes, row_map, constants, torch.float32)
    call.scaling, call.softcap, call.window, call.causal = scaling, softcap, window, causal
    grad = grad.float().contiguous()
    found = tuple(torch.zeros(x.shape, dtype=torch.float32) for x in (query, key, value))
    call.grad = grad.data_ptr()
    call.dquery, call.dkey, call.dvalue = (x.data_ptr() for x in found)
    load("attention").attention_backward(ctypes.byref(call))
    del held
    dquery, dkey, dvalue = found
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


@attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    tensors, ctx.rest = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return *attention_backward(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 8


attention.register_autograd(_differentiate, setup_context=_save)


@functools.cache
def map_index(name: str) -> int:
    """The kernel's number of a row map.

    Raises:
        KernelUnavailable: it has none of that name.
    """
    index = int(load("attention").attention_map(name.encode()))
    if index < 0:
        raise KernelUnavailable(f"attention.cpp has no row map {name!r}")
    return index


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    slopes: Tensor | None,
    row_map: str,
    constants: Sequence[float],
    dtype: torch.dtype,
) -> tuple[_Call, list[Any]]:
    """The kernel's arguments, and what must live as long as they do."""
    call = _Call()
    held: list[Any] = [(ctypes.c_float * len(constants))(*constants)]
    call.constants = ctypes.addressof(held[0])
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        tensor = tensor.to(dtype)
        tensor = tensor if tensor.stride(3) == 1 else tensor.contiguous()
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_strides", tuple(tensor.stride()[:3]))
        held.append(tensor)
    if keep is not None:
        call.keep = keep.data_ptr()
        strides = zip(keep.stride(), keep.shape, strict=True)
        call.keep_strides = tuple(stride if n > 1 else 0 for stride, n in strides)
        held.append(keep)
    if slopes is not None:
        held.append(slopes.float().contiguous())
        call.slopes = held[-1].data_ptr()
    call.batch, call.heads, call.queries, call.dim = query.shape
    _, call.kv_heads, call.keys, call.value_dim = value.shape
    call.map, call.threads = map_index(row_map), torch.get_num_threads()
    return call, held
