"""The parameter `weight` of a model's head, which other libraries take for the matrix `(V, D)` of its logits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.embeddings.head_rows import RowsEmbedding
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
                return func(*args, **(kwargs or {})).as_subclass(_values(cls))
            own = next(a for a in _flat((args, kwargs or {})) if isinstance(a, _Guarded))
            raise ValueError(own._refusal(func, reader))

    def _refusal(self, func: Callable[..., Any], reader: str) -> str:
        raise NotImplementedError


class HeadValues(_Guarded):
    """What other code cast from a head's weight to another dtype or device, still no matrix of logits."""

    def _refusal(self, func: Callable[..., Any], reader: str) -> str:
        return (
            f"{_asked(func, reader)} `weight` {tuple(self.shape)} of a head that hf_softheads put in, but its logits "
            "are not `hidden @ weight.T`, so the result would be another model's; use head(hidden), "
            "head.token_statistics(hidden, labels) or head.subset(hidden, tokens), turn off the option that multiplies "
            "by lm_head.weight, or hf_softheads.unpatch the model. weight.detach() gives the plain numbers"
        )


class HeadWeight(HeadValues, nn.Parameter):
    """The parameter itself."""


class EmbeddingValues(_Guarded):
    """What other code cast from an embedding's weight, no rows."""

    def _refusal(self, func: Callable[..., Any], reader: str) -> str:
        return (
            f"{_asked(func, reader)} `weight` {tuple(self.shape)} of an input embedding that reads the rows of the "
            "head, which are not in it; call the embedding: model.get_input_embeddings()(tokens)"
        )


class EmbeddingWeight(EmbeddingValues, nn.Parameter):
    """The parameter itself."""


def _values(kind: type) -> Any:
    return EmbeddingValues if issubclass(kind, EmbeddingValues) else HeadValues


def guard_weight(module: nn.Module | None) -> None:
    """Let the `weight` of a head, or of an embedding that reads its rows, refuse other code's products.

    It stays the same object; that of a head whose logits are products with it goes unguarded. Wrappers that put another
    tensor in its place (FSDP, `to_empty`) take the guard off.
    """
    if isinstance(module, DenseHead) or not isinstance(module, Head | RowsEmbedding):
        return
    weight: Any = module._parameters.get("weight")
    if type(weight) is nn.Parameter:
        weight.__class__ = HeadWeight if isinstance(module, Head) else EmbeddingWeight
    if isinstance(module, Head) and not hasattr(module, "bias"):
        module.register_parameter("bias", None)  # read beside `weight`, which then says why not


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


def _asked(func: Callable[..., Any], reader: str) -> str:
    return f"{reader} reads rows or products ({getattr(func, '__name__', func)}) of the parameter"


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, tuple | list):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]
