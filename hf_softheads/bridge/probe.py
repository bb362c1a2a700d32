"""A trial run of a freshly patched model: is its attention really computed by what was put in?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_softheads.attention.base import AttentionVariant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keywords of the attention interface that the bridge understands or that a variant may ignore: they change masks or
# caches, which arrive resolved.
_HARMLESS = {
    "position_ids",
    "position_bias",
    "s_aux",
    "sliding_window",
    "softcap",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
    "is_causal",
    "cache_position",
    "past_key_values",
    "past_key_value",
    "layer_head_mask",
    "head_mask",
    "position_embeddings",
    "attention_dropout",
    "return_dict",
    "shared_kv_states",
    "bidirectional_mask",
    "deterministic",
}


@torch.no_grad()
def probe(model: PreTrainedModel, variants: dict[int, AttentionVariant]) -> None:
    """Run a few tokens: every chosen layer must have been called, with nothing it would wrongly ignore.

    Raises:
        ValueError: one was not, or is given what it would ignore; or the model does not run on tokens alone.
    """
    modes = {module: module.training for module in model.modules()}
    calls: dict[int, list[set[str]]] = {index: [] for index in variants}
    for index, variant in variants.items():
        variant.__dict__["probe"] = calls[index]
    try:
        model.eval()
        model(**_few_tokens(model), use_cache=False)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} could not be run on a few tokens to see that its attention is computed by what "
            f"was put in: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        for variant in variants.values():
            variant.__dict__.pop("probe", None)
    silent = [index for index, seen in calls.items() if not seen]
    if silent:
        raise ValueError(
            f"the attention of layers {silent} was never called: {type(model).__name__} bypasses it"
        )
    unknown = set().union(*(names for seen in calls.values() for names in seen)) - _HARMLESS
    if unknown:
        raise ValueError(
            f"{type(model).__name__} passes {', '.join(sorted(unknown))} to its attention, which this variant would "
            "ignore; its outputs would be silently wrong"
        )


def _few_tokens(model: PreTrainedModel) -> dict[str, Any]:
    """What a model can be called with; a decoder that listens gets an encoder's output, since only its own layers are
    of interest."""
    from transformers.modeling_outputs import BaseModelOutput

    tokens = torch.zeros(1, 4, dtype=torch.long, device=model.device)  # 0 is in any vocabulary
    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens}
    if model.main_input_name == "input_ids":
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    width = model.config.get_text_config().hidden_size
    heard = torch.zeros(1, 4, width, device=model.device, dtype=model.dtype)
    return {"decoder_input_ids": tokens, "encoder_outputs": BaseModelOutput(heard)}
