"""The parameter `weight` of a model's head, which other libraries take for the matrix `(V, D)` of its logits."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_softheads.bridge.heads import active_head
from hf_softheads.compiling import constant
from hf_softheads.embeddings.head_rows import RowsEmbedding
from hf_softheads.heads.base import Head
from hf_softheads.heads.dense import DenseHead

_OWN = __name__.partition(".")[0]

# Whose code may do with a parameter what it likes: update it, shard it, move it, write it down.
_KEEPERS = (
    f"{_OWN}.",
    "accelerate.",
    "deepspeed.",
    "safetensors.",
    "torch._export.",
    "torch.distributed.",
    "torch.export.",
    "torch.nn.parallel.",
    "torch.nn.parameter",
    "torch.nn.utils.convert_parameters",
    "torch.optim.",
    "torch.serialization",
)
_CALLS = ("_call_impl", "_wrapped_call_impl")  # by which a module hands on a call
_COMPILED = ("torch._inductor.", "torch._functorch._aot_autograd.")

# What a product with the matrix begins with, by name.
_READS = {
    "linear", "bilinear", "embedding", "embedding_bag", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "baddbmm",
    "einsum", "tensordot", "inner", "dot", "vdot", "__matmul__", "__rmatmul__", "__getitem__", "index_select", "gather",
    "take_along_dim", "t", "T", "mT", "H", "mH", "adjoint", "transpose", "swapaxes", "swapdims", "movedim", "permute",
    "linear_cross_entropy",
}  # fmt: skip
_CASTS = {"to", "type", "float", "double", "half", "bfloat16", "cpu", "cuda"}
# What is asked for by name: the numbers as such, and other ones.
_PLAIN = {
    "data", "detach", "grad", "empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like",
}  # fmt: skip
_FACTS = {"size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "get_device"}


class _Guarded(Tensor):
    """Refuses to be read as a matrix by code outside this package, in eager mode, traced or compiled.

    All its numbers in another form are guarded as it is. Single numbers, other types than floating point, and what is
    done in place go through; rows, columns and products are refused.
    """

    why: ClassVar[str]  # not

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_dynamo_compiling():
            return _check_head_weight(func, args, kwargs)
        if _is_for_eager(func):
            return torch._dynamo.disable(_check_head_weight)(func, args, kwargs)  # ends the graph
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class HeadValues(_Guarded):
    """What other code made of a head's weight, number by number: still no matrix of logits."""

    why = (
        "a head that hf_softheads put in, but its logits are not `hidden @ weight.T`, so the result would be another "
        "model's; use head(hidden), head.token_statistics(hidden, labels) or head.subset(hidden, tokens), turn off the "
        "option that multiplies by lm_head.weight, or hf_softheads.unpatch the model. weight.detach() gives the plain "
        "numbers"
    )


class HeadWeight(HeadValues, nn.Parameter):
    """The parameter itself."""


class EmbeddingValues(_Guarded):
    """What other code made of an embedding's weight: no rows."""

    why = (
        "an input embedding that reads the rows of the head, which are not in it; call the embedding: "
        "model.get_input_embeddings()(tokens)"
    )


class EmbeddingWeight(EmbeddingValues, nn.Parameter):
    """The parameter itself."""


def guard_weight(module: nn.Module | None) -> None:
    """Let the `weight` of a head, or of an embedding that reads its rows, refuse to be read as a matrix.

    It stays the same object; that of a head whose logits are products with it goes unguarded.
    """
    if isinstance(module, DenseHead) or not isinstance(module, Head | RowsEmbedding):
        return
    weight: Any = module._parameters.get("weight")
    if type(weight) is nn.Parameter:
        weight.__class__ = HeadWeight if isinstance(module, Head) else EmbeddingWeight
    if isinstance(module, Head) and not hasattr(module, "bias"):
        module.register_parameter("bias", None)  # read beside `weight`, which then says why not


def guard_again(model: Any, _: Any = None) -> None:
    """A hook before a model's calls: FSDP2 and `to_empty` have put other parameters in place of the guarded ones."""
    if not torch.compiler.is_compiling():
        for module in (active_head(model), model.get_input_embeddings()):
            guard_weight(module)


def _check_head_weight(func: Any, args: Any, kwargs: Any) -> Any:
    """`func(*args, **kwargs)`, if the code that asks for it may have that."""
    name = _name(func)
    if name in _READS and (reader := _reader(_frames())) is not None:
        raise ValueError(_refusal(name, _own(args, kwargs), reader))
    with torch._C.DisableTorchFunctionSubclass():
        found = func(*args, **kwargs)
    if name in _PLAIN or func.__name__ == "__get__":
        return found
    if name == "data_ptr" and (reader := _reader(_frames())) is not None:
        if reader.startswith("triton."):  # takes the address and reads what is there
            raise ValueError(_refusal(name, _own(args, kwargs), reader))
        return found
    with torch._C.DisableTorchFunctionSubclass():
        given = {id(leaf) for leaf in _leaves((args, kwargs))}
        made = [x for x in _leaves(found) if isinstance(x, Tensor) and id(x) not in given]
        made = [x for x in made if x.is_floating_point() and (x.numel() > 1 or name in _CASTS)]
        of_all = name == "cat" and all(x.ndim == 1 for x in made)  # every parameter in one vector
        if not made or of_all or name.startswith("_foreach_"):
            return found
        reader, own = _reader(_frames()), _own(args, kwargs)
        if reader is None:
            return found
        if any(x.numel() != own.numel() for x in made):
            raise ValueError(_refusal(name, own, reader))
        kind = EmbeddingValues if isinstance(own, EmbeddingValues) else HeadValues
        return found.as_subclass(kind) if type(found) is Tensor else found


def _reader(frames: Iterable[tuple[str, str]]) -> str | None:
    """The module whose code asks, by the modules and functions that called each other, the last one first.

    None where it may have what it wants, and where compiled code runs, which was asked while it was traced.
    """
    launched = None  # a kernel, on somebody's behalf
    for module, function in frames:
        moves = module == "torch.nn.modules.module" and function not in _CALLS
        if not module or moves or module.startswith((*_KEEPERS, *_COMPILED)):
            return None
        package = module.partition(".")[0]
        if package == "triton":
            launched = module
        elif package != "torch":
            return launched or module
    return None


def _frames() -> Iterator[tuple[str, str]]:
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module != __name__:
            yield module, frame.f_code.co_name
        frame = frame.f_back


@constant
def _is_for_eager(func: Any) -> bool:
    """Whether traced code asks for what `_check_head_weight` must see: the graph ends there. Called while tracing."""
    from torch._guards import TracingContext

    name = _name(func)
    attribute = func.__name__ == "__get__" and name not in _READS
    if attribute or name in _FACTS or name in _PLAIN:
        return False
    modules = {getattr(module, "__file__", None): key for key, module in list(sys.modules.items())}
    stack = [f for f in TracingContext.extract_stack() if f.filename != __file__]
    return (
        not stack
        or _reader((modules.get(f.filename, f.filename), f.name) for f in stack[::-1]) is not None
    )


def _name(func: Any) -> str:
    """Of a function, or of the attribute that a getter gets."""
    if func.__name__ == "__get__":
        return str(func.__self__.__name__)
    return str(func.__name__)


def _own(args: Any, kwargs: Any) -> _Guarded:
    return next(x for x in _leaves((args, kwargs)) if isinstance(x, _Guarded))


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, tuple | list):
        yield values
        return
    for value in values:
        yield from _leaves(value)


def _refusal(name: str, own: _Guarded, reader: str) -> str:
    return f"{reader} reads rows or products ({name}) of the parameter `weight` {tuple(own.shape)} of {own.why}"
