"""The loss of a family's own forward: whether it can be computed elsewhere, its targets, and another in its place."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100


def asks_for_loss(model: PreTrainedModel) -> bool:
    """Does the model's forward call `self.loss_function`, so that the loss can be computed elsewhere?

    Others (BART, T5, Whisper, most masked models) compute a cross-entropy of their logits themselves.
    """
    for owner in type(model).__mro__:
        forward = vars(owner).get("forward")
        code = getattr(inspect.unwrap(forward), "__code__", None) if forward else None
        if code is None:
            continue
        if "loss_function" in code.co_names:
            return True
        if not {"super", "forward"} <= set(code.co_names):
            return False
    return False


def targets_of(
    model: PreTrainedModel,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORE,
) -> Tensor:
    """The token that each hidden state must predict, -100 where none: the next label, or in a model with an encoder,
    whose decoder reads its labels shifted already, the label at the same place."""
    if shift_labels is not None:
        targets = shift_labels
    elif model.config.is_encoder_decoder:
        targets = labels
    else:
        ends = torch.full_like(labels[:, :1], IGNORE)
        targets = torch.cat([labels[:, 1:], ends], 1)
    return (
        targets if ignore_index == IGNORE else targets.masked_fill(targets == ignore_index, IGNORE)
    )


def with_decoder_inputs(model: PreTrainedModel, labels: Tensor, batch: dict[str, Any]) -> None:
    """Add to the batch what the decoder of a model with an encoder reads, made from the labels as the family does.

    Raises:
        ValueError: the family does not say how.
    """
    if not model.config.is_encoder_decoder:
        return
    if batch.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        return
    config = model.config
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    elif shift := getattr(sys.modules[type(model).__module__], "shift_tokens_right", None):
        shifted = shift(labels, config.pad_token_id, config.decoder_start_token_id)
    else:
        raise ValueError(
            f"{type(model).__name__} does not say what its decoder reads for these labels; give decoder_input_ids"
        )
    batch["decoder_input_ids"] = shifted


@contextlib.contextmanager
def loss_as(
    model: PreTrainedModel, function: Callable[..., Tensor]
) -> Iterator[Callable[..., Tensor]]:
    """Within the context the model's `loss_function` is this one; gives its own."""
    own = model.__dict__.get("_loss_function")
    original: Callable[..., Tensor] = model.loss_function
    model.__dict__["_loss_function"] = function
    try:
        yield original
    finally:
        if own is None:
            del model.__dict__["_loss_function"]
        else:
            model.__dict__["_loss_function"] = own


def loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output, a tuple or not."""
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None


def without_logits(output: Any, loss: Tensor) -> Any:
    """The output with this loss and no logits."""
    if isinstance(output, tuple):  # (loss, logits, …), or (logits, …)
        rest = output[1:] if loss_of(output) is None else output[2:]
        return (loss, None, *rest)
    fields = {name: value for name, value in output.items() if name not in ("loss", "logits")}
    return type(output)(loss=loss, **fields)


@torch.no_grad()
def check_own_loss(model: PreTrainedModel, output: Any, targets: Tensor) -> None:
    """Is the loss that a family computes itself the mean cross-entropy of its logits, and nothing more?

    Raises:
        ValueError: it is not; an `Objective` could not keep what is added.
    """
    loss, logits = loss_of(output), output.logits.float()
    if loss is None or not (targets != IGNORE).any():
        return
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    rounding = max(1e-5, 4 * torch.finfo(loss.dtype).eps) * abs(float(wanted))
    if not abs(float(loss) - float(wanted)) <= rounding:
        raise ValueError(
            f"{type(model).__name__} computes its loss itself and adds something to the cross-entropy of its logits "
            f"({float(loss):.6g}, not {float(wanted):.6g}), which an Objective cannot keep; train with the model's own "
            "loss"
        )
