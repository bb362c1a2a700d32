"""transformers' attention interface: one registered implementation, its mask, and the layers that call it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_softheads.attention.base import AttentionVariant, run
from hf_softheads.attention.call import AttentionMap, Geometry, Inputs, Observer
from hf_softheads.attention.learned_sink import LearnedSink
from hf_softheads.attention.softmax import Softmax
from hf_softheads.bridge.hidden import CHILD, pop_layer_input, pop_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "hf_softheads"  # the attention implementation, also the marker in config.json
_SOFTMAX, _SINKS = Softmax(), LearnedSink()  # of layers without a variant
_OBSERVER = "softheads_observer"
_SHOWN = "softheads_shown"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every attention layer: query `(B,H,Q,D)` to `(B,Q,H,Dv)`.

    A layer without a variant computes ordinary softmax attention, with the layer's soft cap and sinks. The second value
    is the attention map where `output_attentions` asks for it.

    Raises:
        NotImplementedError: the layer has sinks and its variant has none.
    """
    variant = getattr(module, CHILD, None)
    sinks = kwargs.get("s_aux")
    if sinks is not None and variant is not None and not variant.spec.takes_sinks:
        raise NotImplementedError(
            f"{type(module).__name__} has learned attention sinks (s_aux), which {variant.spec.name} would ignore; "
            "patch it with `learned_sink`, which starts from them"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = pop_state(module)
    if layer is not None and attention_mask is not None:
        attention_mask = layer.new_columns(attention_mask, key.shape[2])
    keep, bias = visible(attention_mask, query, key, causal)
    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    if keep is None and causal and key.shape[2] > query.shape[2] > 1:
        # a static cache being filled: the mask is implied and only the first Q entries are written
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    hidden, tempered = pop_layer_input(module)
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        keep=keep,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        bias=bias,
        hidden=hidden,
        tempered=tempered,
        causal=causal,
        dropout=dropout if module.training else 0.0,
        observe=getattr(module, _OBSERVER, None),
        state=None if layer is None else layer.state,
    )
    shown = None
    if _wants_weights(module, kwargs):
        shown = AttentionMap()
        inputs = inputs.replace(observe=shown)
    if variant is None:
        out = run(_SOFTMAX, {}, inputs) if sinks is None else run(_SINKS, {"sinks": sinks}, inputs)
    else:
        probe = getattr(variant, "probe", None)
        if probe is not None:
            probe.append({name for name, given in kwargs.items() if given is not None})
        if layer is not None:
            layer.record(variant, inputs)
        out = variant(inputs)
    return out.transpose(1, 2).contiguous(), None if shown is None else shown.whole


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(module, _SHOWN, None)
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked)


def visible(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`(keep, bias)` from any mask a model may pass: None, boolean, or additive (`finfo.min` means hidden).

    `keep` None means causal with offset `K − Q`, which for one query is everything.
    """
    if mask is None:
        if causal:
            return None, None
        return torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device), None
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return mask, None
    keep = mask > torch.finfo(mask.dtype).min / 2
    return keep, mask.masked_fill(~keep, 0.0)


@contextlib.contextmanager
def observed(model: PreTrainedModel, observers: Mapping[int, Observer]) -> Iterator[None]:
    """Inside, every attention layer shows its weights to the observer of its index, patched or not.

    Raises:
        ValueError: the family computes its attention itself.
    """
    register()
    layers = attention_layers(model)
    if not layers or not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) computes its attention itself instead of through "
            "transformers' attention interface, so its weights cannot be seen"
        )
    before = model.config._attn_implementation
    try:
        for index, observer in observers.items():
            setattr(layers[index][1], _OBSERVER, observer)
        if before != IMPLEMENTATION:
            model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        for index in observers:
            layers[index][1].__dict__.pop(_OBSERVER, None)
        if before != IMPLEMENTATION:
            model.set_attn_implementation(before)


@contextlib.contextmanager
def showing(model: nn.Module) -> Iterator[None]:
    """Inside, every attention layer returns its weights, also where the family takes the request for itself (gpt2)."""
    modules = [module for _, module in attention_layers(model).values()]
    try:
        for module in modules:
            setattr(module, _SHOWN, True)
        yield
    finally:
        for module in modules:
            module.__dict__.pop(_SHOWN, None)


def take_sinks(module: nn.Module, variant: AttentionVariant) -> None:
    """Start a variant that takes them from the attention sinks `(H,)` that the layer was trained with."""
    sinks = getattr(module, "sinks", None)
    if variant.spec.takes_sinks and isinstance(sinks, Tensor):
        with torch.no_grad():
            variant.get_parameter("sinks").copy_(sinks)


@functools.cache
def register() -> None:
    """Make the implementation known to transformers, before the first model uses it.

    Not on import: the modules that hold the registers are those of its models, which bring torch's compiler with them
    and take seconds to load.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


_CROSS = ("cross", "encoder_attn", "encdec")  # in the names of layers that attend to an encoder


def attention_layers(model: nn.Module) -> dict[int, tuple[str, Any]]:
    """`{index: (path, module)}` of the self-attention layers that call the attention interface, in order.

    Of a model that reads images or sound besides text, those of its language model alone.
    """
    found: dict[int, tuple[str, Any]] = {}
    within = language_modules(model)
    for path, module in model.named_modules():
        if not _calls_interface(module.__class__) or getattr(module, "is_cross_attention", False):
            continue
        if any(name in path.rpartition(".")[2].lower() for name in _CROSS):
            continue
        if within is not None and module not in within:
            continue
        index = getattr(module, "layer_idx", None)
        found[len(found) if index is None or index in found else index] = (path, module)
    return dict(sorted(found.items()))


def modalities(model: Any) -> tuple[str, ...]:
    """What a transformers model reads: text, image, …"""
    found = getattr(model, "input_modalities", None) or ("text",)
    return (found,) if isinstance(found, str) else tuple(found)


def language_modules(model: nn.Module) -> set[nn.Module] | None:
    """The modules of the language model inside a multi-modal one; None for a model of one kind of input."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or len(modalities(model)) < 2:
        return None
    return set(model.get_decoder().modules()) if model.get_output_embeddings() is not None else None


@functools.cache
def _calls_interface(cls: Any) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


def geometry(model: PreTrainedModel, index: int, module: Any) -> Geometry:
    """Heads, sizes and index of one attention layer, as a variant's parameters need them.

    Raises:
        ValueError: the layer's configuration does not say.
    """
    config = getattr(module, "config", None) or model.config
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if heads is None or hidden is None:
        raise ValueError(
            f"{type(model).__name__} does not say its number of heads and hidden size in its config; "
            "the geometry that the variant's parameters need is unknown"
        )
    return Geometry(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(module, "head_dim", None)
        or getattr(config, "head_dim", None)
        or hidden // heads,
        hidden_size=hidden,
        layer_idx=index,
        layers=getattr(config, "num_hidden_layers", None) or index + 1,
    )
