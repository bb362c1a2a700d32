"""The parameter `weight` of a model's head, which other libraries take for the matrix `(V, D)` of its logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head
from hf_softheads.heads.dense import DenseHead

_OWN = __name__.partition(".")[0]

# What a product with the matrix begins with. Everything else (dtype, device, shape, optimizers, hooks, saving,
# `detach()`) goes through.
_PRODUCTS = {
    F.linear,
    F.embedding,
    torch.matmul,
    torch.mm,
    torch.mv,
    torch.bmm,
    torch.addmm,
    torch.einsum,
    torch.tensordot,
    torch.t,
    torch.transpose,
    torch.index_select,
    Tensor.matmul,
    Tensor.mm,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.__getitem__,
    Tensor.index_select,
    Tensor.t,
    Tensor.transpose,
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
}
_CASTS = {Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type}


class _Guarded(Tensor):
    """Refuses to be multiplied by code outside this package; inside `torch.compile` nothing is checked."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling() or (func not in _PRODUCTS and func not in _CASTS):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        reader = _reader()
        with torch._C.DisableTorchFunctionSubclass():
            if reader in (_OWN, "torch"):
                return func(*args, **(kwargs or {}))
            if func in _CASTS and reader.startswith("accelerate."):
                return func(
                    *args, **(kwargs or {})
                )  # offloads it, and makes a parameter of it again
            if func in _CASTS:
                return func(*args, **(kwargs or {})).as_subclass(HeadValues)
            own = next(a for a in _flat((args, kwargs or {})) if isinstance(a, _Guarded))
            raise ValueError(_refusal(func, tuple(own.shape), reader))


class HeadWeight(_Guarded, nn.Parameter):
    """The parameter itself."""


class HeadValues(_Guarded):
    """What other code cast from it to another dtype or device, still no matrix of logits."""


def guard_weight(head: nn.Module | None) -> None:
    """Let the head's `weight` refuse other code's products, unless it is the matrix of the head's logits.

    It stays the same object. Wrappers that put another tensor in its place (FSDP, `to_empty`) take the guard off.
    """
    if not isinstance(head, Head) or isinstance(head, DenseHead):
        return
    weight = head._parameters.get("weight")
    if type(weight) is nn.Parameter:
        weight.__class__ = HeadWeight
    if not hasattr(head, "bias"):
        head.register_parameter("bias", None)  # read beside `weight`, which then says why not


def _reader() -> str:
    """The package whose code asks; `torch` where a module casts or moves itself."""
    frame: Any = sys._getframe(2)
    first = str(frame.f_globals.get("__name__", ""))
    if first.startswith("torch.nn.modules"):
        return "torch"
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] != "torch":
            return _OWN if name.partition(".")[0] == _OWN else name
        frame = frame.f_back
    return "torch"


def _refusal(func: Callable[..., Any], shape: tuple[int, ...], reader: str) -> str:
    return (
        f"{reader} reads rows or products ({getattr(func, '__name__', func)}) of the parameter `weight` {shape} of a "
        "head that hf_softheads put in, but its logits are not `hidden @ weight.T`, so the result would be another "
        "model's; use head(hidden), head.token_statistics(hidden, labels) or head.subset(hidden, tokens), turn off "
        "the option that multiplies by lm_head.weight, or hf_softheads.unpatch the model. weight.detach() gives the "
        "plain numbers"
    )


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, tuple | list):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]
