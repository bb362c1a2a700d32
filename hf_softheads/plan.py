"""What a model carries: the plan that it is patched with, and what was taken out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from hf_softheads import bridge
from hf_softheads.config import SoftheadsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys of config.json that make a transformers without this package refuse the folder, by name, instead of loading a
# wrong model: recent versions read the first, older ones the second.
MARKERS = ("attn_implementation", "_attn_implementation")
_TAKEN_OUT = "_softheads_taken_out"


def plan_of(model: PreTrainedModel) -> SoftheadsConfig | None:
    """The plan that a model is patched with, or None."""
    plan = getattr(model.config, "quantization_config", None)
    return plan if isinstance(plan, SoftheadsConfig) and isinstance(model, bridge.Patched) else None


def mark(model: PreTrainedModel, plan: SoftheadsConfig) -> None:
    """Write the plan, and the marker that stops other readers, into the model's config."""
    plan.stats = None
    fields = model.config.__dict__
    fields["quantization_config"] = plan
    for marker in MARKERS:
        fields[marker] = bridge.IMPLEMENTATION


def unmark(model: PreTrainedModel) -> None:
    """Take the plan and the marker out of the config; a body that is quantized keeps its own plan."""
    fields = model.config.__dict__
    if isinstance(fields.get("quantization_config"), SoftheadsConfig):
        del fields["quantization_config"]
        quantizer = model.__dict__.get("hf_quantizer")
        if quantizer is not None:
            fields["quantization_config"] = quantizer.quantization_config
    for marker in MARKERS:
        fields.pop(marker, None)


def taken_out(model: PreTrainedModel) -> dict[str, Any]:
    """What `patch` took out of this model, by slot; empty for a model that was loaded from a checkpoint."""
    found: dict[str, Any] = model.__dict__.get(_TAKEN_OUT) or {}
    return found


def remember_taken_out(model: PreTrainedModel, by_slot: dict[str, Any]) -> None:
    """Keep what was taken out with the model, as a plain attribute: it is no part of its parameters."""
    if by_slot:
        model.__dict__[_TAKEN_OUT] = by_slot
    else:
        model.__dict__.pop(_TAKEN_OUT, None)


def dense_head(model: nn.Module) -> nn.Module:
    """The head that `patch` took out: the teacher for a repair on the same hidden states.

    Raises:
        ValueError: the model was not patched in this process.
    """
    head = taken_out(bridge.transformers_model(model)).get("head")
    if not isinstance(head, nn.Module):
        raise ValueError(
            "this model does not hold its dense head: it was loaded from a patched checkpoint, or its head was never "
            "patched; load the original model and give its get_output_embeddings()"
        )
    return head
