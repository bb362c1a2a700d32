"""The scores of a head as one operator of torch, which autograd, torch.compile and torch.export know.

`softheads::scores` takes the head's tensors and, as text, how the head was built. Behind the operator, where nothing is
traced, the head is built again around these tensors and kept, with the tables that its kernel derives from them, until
the first of them dies. Gradients are those of the plain definition, computed only where they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_CLASSES: dict[str, Any] = {}
_BUILT: Any = WeakTensorKeyDictionary()  # first tensor -> (what it was built from, head)


class Rebuilt(nn.Module):
    """A module without children that can be built again around its tensors, from its class and its arguments."""

    _built_by: str

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        object.__setattr__(self, "_built_by", json.dumps([cls.__name__, args, kwargs]))
        return self

    def operator_scores(self, hidden: Tensor) -> Tensor:
        """Scores `(B, V)` fp32 of `hidden (B, D)`, inside the operator: no gradients, nothing is traced."""
        raise NotImplementedError

    def plain_scores(self, hidden: Tensor) -> Tensor:
        """The definition of these scores, differentiable."""
        raise NotImplementedError


def scores(head: Any, hidden: Tensor) -> Tensor:
    """`head.operator_scores(hidden)` as an operator: `hidden (B, D)` to `(B, V)` fp32."""
    tensors = [*head.parameters(), *head.buffers()]
    found: Tensor = _scores(hidden, tensors, head.out_features, f"{head.kernels} {head._built_by}")
    return found


def _build(tensors: Sequence[Tensor], text: str) -> Any:
    kernels, built_by = text.split(" ", 1)
    name, args, kwargs = json.loads(built_by)
    with torch.device("meta"):
        head = _CLASSES[name](*args, **kwargs)
    head.kernels = kernels
    places = [
        *((head._parameters, name) for name, _ in head.named_parameters()),
        *((head._buffers, name) for name, _ in head.named_buffers()),
    ]
    for (store, name), tensor in zip(places, tensors, strict=True):
        store[name] = tensor
    return head


@torch.library.custom_op(
    "softheads::scores",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor hidden, Tensor[] tensors, int vocab, str head) -> Tensor",
)
def _scores(hidden: Tensor, tensors: Sequence[Tensor], vocab: int, head: str) -> Tensor:
    source = head, [(t.data_ptr(), t.dtype) for t in tensors]
    kept = _BUILT.get(tensors[0])
    if kept is None or kept[0] != source:
        # Detached: the tensors themselves would keep the first one alive.
        kept = _BUILT[tensors[0]] = source, _build([t.detach() for t in tensors], head)
    found: Tensor = kept[1].operator_scores(hidden)
    return found


@_scores.register_fake
def _(hidden: Tensor, tensors: Sequence[Tensor], vocab: int, head: str) -> Tensor:
    return hidden.new_empty(hidden.shape[0], vocab, dtype=torch.float32)


@torch.library.custom_op(
    "softheads::scores_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor grad, Tensor hidden, Tensor[] tensors, bool[] wanted, str head) -> Tensor[]",
)
def _scores_backward(
    grad: Tensor, hidden: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool], head: str
) -> list[Tensor]:
    """Gradients of `plain_scores` in the `wanted` ones of the hidden states and the tensors."""

    @torch.enable_grad()
    def differentiate() -> list[Tensor]:
        inputs = [
            t.detach().requires_grad_(w) for t, w in zip((hidden, *tensors), wanted, strict=True)
        ]
        plain = _build(inputs[1:], head).plain_scores(inputs[0])
        leaves = [t for t in inputs if t.requires_grad]
        found = torch.autograd.grad(plain, leaves, grad, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

    # An operator runs where its thread records nothing for gradients; another thread does.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(differentiate).result()


@_scores_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool], head: str
) -> list[Tensor]:
    return [torch.empty_like(t) for t, w in zip((hidden, *tensors), wanted, strict=True) if w]


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    hidden, tensors, _, ctx.head = inputs
    ctx.save_for_backward(hidden, *tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    hidden, *tensors = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    found = iter(_scores_backward(grad, hidden, tensors, wanted, ctx.head))
    first, *rest = (next(found) if w else None for w in wanted)
    return first, rest, None, None


_scores.register_autograd(_differentiate, setup_context=_save)


def _refuse(ctx: Any, grads: Any) -> Any:
    raise RuntimeError(
        "scores by a kernel have no second derivatives; a head in training mode, head.train(), has them"
    )


_scores_backward.register_autograd(_refuse)
