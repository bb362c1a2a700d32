"""A language model's head: finding it, and another in its place for a while."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_softheads.bridge.kinds import how_to_load, named
from hf_softheads.heads.base import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Function = Callable[[Tensor], Tensor]

_PLACING = ("torch", "accelerate", "deepspeed", "hf_softheads")  # whose hooks change no numbers


def find_head(model: PreTrainedModel) -> tuple[str, Any]:
    """Path and module of the output embedding.

    Raises:
        ValueError: the model has none (an encoder, a classifier), or it is no matrix `(V, D)`.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding, so there is no LM head to replace; "
            f"{how_to_load(model.config, ', or patch only its attention')}"
        )
    path = next(path for path, module in model.named_modules() if module is head)
    weight = getattr(head, "weight", torch.empty(0))
    shape = getattr(weight, "ds_shape", weight.shape)  # of a matrix that ZeRO-3 has in pieces
    if not isinstance(head, Head) and len(shape) != 2:
        raise ValueError(f"the head {path} ({type(head).__name__}) is not a matrix (V, D)")
    return path, head


def active_head(model: Any) -> Any:
    """The output embedding that will run: PEFT's `modules_to_save` copy where one is active."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    active = (
        None
        if head.disable_adapters
        else next((a for a in head.active_adapters if a in copies), None)
    )
    return copies[active] if active else head.original_module


def is_hooked(head: nn.Module, forward: Any = None) -> bool:
    """Has other code put a hook on the head, or given it a forward of its own, that may change its scores?

    Not so what torch, accelerate and DeepSpeed put there to place, shard or offload it. `forward` is the head's while
    another is in its place.
    """
    if forward is None or forward is head:
        forward = head.__dict__.get("forward")
    hooks = (*head._forward_pre_hooks.values(), *head._forward_hooks.values(), forward)
    return any(_package(hook) not in _PLACING for hook in hooks if hook is not None)


def _package(function: Any) -> str:
    """The package that a function was written in, whatever it is wrapped as."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    where = getattr(function, "__globals__", {"__name__": type(function).__module__})
    return str(where["__name__"]).partition(".")[0]


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a composite one."""
    return base_model(model).config.get_text_config()


def base_model(model: nn.Module) -> Any:
    """The transformers model inside DDP, `torch.compile` and PEFT wrappers."""
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def transformers_model(model: Any) -> Any:
    """The transformers model inside any wrapper.

    Raises:
        TypeError: there is none; says what was given and what would work.
    """
    from transformers import PreTrainedModel

    if isinstance(model, str | os.PathLike):
        raise TypeError(f"expected a loaded transformers model, got {named(model)}")
    inner = base_model(model) if isinstance(model, nn.Module) else model
    if isinstance(inner, PreTrainedModel):
        return inner
    within = getattr(model, "model", None)
    hint = ""
    if isinstance(model, type):
        hint = f" (the class {model.__name__} itself); give an instance"
    elif isinstance(within, PreTrainedModel):
        hint = "; give the model inside it: its attribute .model"
    raise TypeError(f"expected a transformers model, got {type(model).__name__}{hint}")


def output_head(model: nn.Module) -> nn.Module:
    """The output embedding that will run; a module that is no language model is taken as a head itself.

    Raises:
        ValueError: the model has no output embedding.
    """
    from transformers import PreTrainedModel

    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return model
    head: nn.Module | None = active_head(base)
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no output embedding, so there are no logits to compute a loss from; "
            f"{how_to_load(base.config)}"
        )
    return head


def vocabulary(model_or_matrix: nn.Module | Tensor) -> int:
    """How many tokens a model, a head module or a matrix `(V, D)` scores."""
    if isinstance(model_or_matrix, Tensor):
        return len(model_or_matrix)
    head: Any = output_head(model_or_matrix)
    return getattr(head, "out_features", None) or len(head.weight)


@contextlib.contextmanager
def head_as(model: nn.Module, function: Function) -> Iterator[Function]:
    """Within the context the head computes `function(hidden)`, between its own hooks; gives the head's own forward."""
    head = output_head(model)
    own = head.__dict__.get("forward")
    original: Function = head.forward
    head.__dict__["forward"] = function
    try:
        yield original
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own
