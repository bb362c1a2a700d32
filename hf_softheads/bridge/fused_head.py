"""TRL's fused head on a patched model: what it computes from `lm_head.weight`, computed by the head itself.

`trl.trainer.utils.add_fused_lm_head(model)` gives the model a forward of its own, which with `fused_lm_head=True` takes
the backbone's hidden states, multiplies them by `lm_head.weight` and returns numbers per token. A patched model puts
its own in that forward's place, with the same settings and the same output.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_softheads.bridge.heads import active_head, head_as, is_hooked
from hf_softheads.heads.base import Head
from hf_softheads.heads.forms.token_numbers import labelled

_SETTINGS = {"temperature", "cast_lm_head_to_fp32", "outputs"}
_NUMBERS = {"log_probs": 0, "entropy": 1, "is_top1": 2, "mean_logits": 3, "log_sum_sq_probs": 4}


class _Fused(NamedTuple):
    """What `add_fused_lm_head` was called with, and what its forward returns."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]
    result: type[Any]


def answered(model: Any, forward: Any) -> Any:
    """A forward for `model` in place of one that a library gives it: TRL's fused one is computed by the head.

    Raises:
        ValueError: this TRL asks for something that is not known here.
    """
    if "fused_lm_head" not in (getattr(forward, "__kwdefaults__", None) or {}):
        return forward
    fused = _settings(forward)
    head = active_head(model)
    if isinstance(head, Head) and fused.cast_lm_head_to_fp32:
        # TRL has put `F.linear` with the parameter called `weight` in place of the head's forward
        head.__dict__["forward"] = types.MethodType(_in_fp32, head)

    @functools.wraps(forward.__func__)
    def computed_by_head(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
        }
        if not fused_lm_head or not isinstance(active_head(self), Head):
            return forward(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        return _run(self, forward, fused, args, kwargs, **given)

    computed_by_head.__dict__["theirs"] = forward
    return types.MethodType(computed_by_head, model)


def theirs(forward: Any) -> Any:
    """The library's own forward again."""
    return getattr(forward, "theirs", forward)


def _settings(forward: Any) -> _Fused:
    function = forward.__func__
    known = inspect.getclosurevars(function).nonlocals
    asked = set(inspect.signature(function.__globals__["add_fused_lm_head"]).parameters) - {"model"}
    unknown = (asked - _SETTINGS) | (_SETTINGS - known.keys())
    unknown |= set(known.get("outputs", ())) - _NUMBERS.keys()
    if unknown:
        raise ValueError(
            f"this version of TRL's add_fused_lm_head has {', '.join(sorted(unknown))}, which hf_softheads does not "
            f"know how to compute with a patched head; it knows {', '.join(sorted(_SETTINGS))} with outputs "
            f"{', '.join(_NUMBERS)}. Install trl==1.16.*"
        )
    settings = {name: known[name] for name in _SETTINGS}
    return _Fused(**settings, result=function.__globals__["FusedCausalLMOutput"])


def _in_fp32(head: Head, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return type(head).forward(head, hidden.float())


def _run(
    model: Any,
    forward: Any,
    fused: _Fused,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Any,
) -> Any:
    """The family's own forward with numbers per token in place of its head's scores."""
    head = active_head(model)
    if is_hooked(head):
        raise ValueError(
            f"other code has put a hook on this {type(head).__name__}, or given it a forward of its own, which TRL's "
            "fused head would pass by: it does not call the head. Take it off first"
        )
    if shift_labels is None:
        assert labels is not None
        targets = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    else:
        targets = shift_labels
    moments = bool({"mean_logits", "log_sum_sq_probs"} & set(fused.outputs))
    found: list[Tensor] = []

    def stand_in(hidden: Tensor) -> Tensor:
        plain = contextlib.nullcontext()
        if fused.cast_lm_head_to_fp32:
            hidden, plain = hidden.float(), torch.autocast(hidden.device.type, enabled=False)  # type: ignore[assignment]
        with plain:
            numbers = labelled(
                lambda h, y: head.token_numbers(h, y, fused.temperature, moments),
                hidden,
                targets,
                -100,
            )
        found.append(numbers)
        return numbers

    kwargs["use_cache"] = False
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    with head_as(model, stand_in):
        output = forward(*args, **kwargs)
    (numbers,) = found
    if shift_labels is None:
        numbers, targets = numbers[:, :-1], targets[:, :-1]
    return _result(model, fused, output, kwargs, numbers, targets, num_items_in_batch)


def _result(
    model: Any,
    fused: _Fused,
    output: Any,
    kwargs: dict[str, Any],
    numbers: Tensor,
    targets: Tensor,
    items: Any,
) -> Any:
    targets = targets.to(numbers.device)
    mask = targets != -100
    fields: dict[str, Any] = {name: numbers[..., _NUMBERS[name]] for name in fused.outputs}
    fields["log_probs"] = numbers[..., 0]
    for name in fields.keys() & {"mean_logits", "log_sum_sq_probs"}:
        fields[name] = fields[name].detach()
    if "is_top1" in fields:
        fields["is_top1"] = (fields["is_top1"].detach().long() == targets) & mask
    loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
    aux = getattr(output, "aux_loss", None)
    if kwargs.get("output_router_logits"):
        if aux is None:
            raise ValueError(
                f"output_router_logits is asked for, but {type(model).__name__} returns no aux_loss without labels; "
                "turn off the router's auxiliary loss (router_aux_loss_coef=0)"
            )
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux
    return fused.result(loss=loss, label_mask=mask, aux_loss=aux, **fields)
