"""Running a language model with something else in the place of its head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_softheads.bridge import active_head
from hf_softheads.heads.base import LogitTransform

Function = Callable[[Tensor], Tensor]


def base_model(model: nn.Module) -> Any:
    """The transformers model inside DDP, `torch.compile` and PEFT wrappers."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def output_head(model: nn.Module) -> nn.Module:
    """The output embedding that will run; a module that is no language model is taken as a head itself.

    Raises:
        ValueError: the model has no output embedding.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return model
    head: nn.Module | None = active_head(base)
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no output embedding, so there are no logits to compute a loss from; "
            "load it with AutoModelForCausalLM"
        )
    return head


def vocabulary(model_or_matrix: nn.Module | Tensor) -> int:
    """How many tokens a model, a head module or a matrix `(V, D)` scores."""
    if isinstance(model_or_matrix, Tensor):
        return len(model_or_matrix)
    head: Any = output_head(model_or_matrix)
    return int(getattr(head, "out_features", None) or len(head.weight))


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


@torch.no_grad()
def check_transform(model: nn.Module, transform: LogitTransform, batch: Mapping[str, Any]) -> None:
    """Compare the head's scores after `transform` with the model's own logits on a few tokens.

    Raises:
        ValueError: they differ.
    """
    base = base_model(model)
    raw: list[Tensor] = []
    handle = output_head(model).register_forward_hook(lambda _, __, out: raw.append(out))
    training = base.training
    base.eval()
    try:
        logits = base(input_ids=batch["input_ids"][:1, :8], use_cache=False).logits.float()
    finally:
        handle.remove()
        base.train(training)
    expected = transform(raw[0].float())
    error = float((logits - expected).abs().max())
    if not error <= 1e-2 * float(expected.abs().max()) + 1e-4:
        raise ValueError(
            f"the logits of {type(base).__name__} differ by {error:.3g} from its head's scores after "
            f"{transform}: it does something after its head that is not understood, so a loss computed from "
            "hidden states would be wrong"
        )
