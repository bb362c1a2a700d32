"""What a variant needs besides query, key and value: the layer's input and cache, values tempered before they enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from hf_softheads.attention.base import AttentionSpec, AttentionVariant
from hf_softheads.attention.call import NewValues
from hf_softheads.bridge.cache_state import StateLayer, state_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHILD = "softheads"  # the attention layers' child module that holds a variant and its parameters
_HIDDEN = "softheads_hidden"
_TEMPERED = "softheads_tempered"
_STATE = "softheads_state"


def capture_layer_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention layer: keeps the layer's input for `attention_forward`, in the same call, and
    the state for a variant that has one. For a variant that tempers values, the layer gets its cache in a wrapper that
    tempers what enters."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    setattr(module, _HIDDEN, hidden)
    variant: Any = getattr(module, CHILD, None)
    if variant is not None and variant.spec.has_state:
        for cache in (*args, *kwargs.values()):
            if isinstance(cache, Cache):
                layer = state_layer(cache, getattr(module, "layer_idx", 0), variant.spec)
                setattr(module, _STATE, layer)
    if variant is None or not variant.spec.tempers_values:
        return None

    def temper(value: Tensor) -> Tensor:
        setattr(module, _TEMPERED, True)
        tempered: Tensor = variant(NewValues(value, hidden))
        return tempered

    def wrapped(argument: Any) -> Any:
        if isinstance(argument, EncoderDecoderCache):
            raise NotImplementedError(
                f"{variant.spec.name} tempers values, which a cache for an encoder and a decoder cannot take; run with "
                "use_cache=False"
            )
        return _Tempering(argument, temper) if isinstance(argument, Cache) else argument

    return tuple(map(wrapped, args)), {name: wrapped(value) for name, value in kwargs.items()}


def pop_layer_input(module: nn.Module) -> tuple[Tensor | None, bool]:
    """The layer's input, and whether its values are tempered already; both are forgotten."""
    hidden = getattr(module, _HIDDEN, None)
    if hidden is not None:
        setattr(module, _HIDDEN, None)
    tempered = getattr(module, _TEMPERED, False)
    if tempered:
        setattr(module, _TEMPERED, False)
    return hidden, tempered


def pop_state(module: nn.Module) -> StateLayer | None:
    """The cache's state for this layer, in a call with a cache of a variant that has one; it is forgotten."""
    layer = getattr(module, _STATE, None)
    if layer is not None:
        setattr(module, _STATE, None)
    return layer


def prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
) -> None:
    """After transformers' `_prepare_cache_for_generation`: a state where a variant has one, before anything is read.

    An assistant's cache is rolled back, as its `generate` says before there are states. Steps are not compiled: the
    state counts its tokens, each of which would be compiled for.
    """
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, Cache):
        return
    for module in model.modules():
        variant: Any = module._modules.get(CHILD)
        causal = getattr(module, "is_causal", True)  # an encoder beside it has no cache
        if causal and variant is not None and variant.spec.has_state:
            layer = state_layer(cache, getattr(module, "layer_idx", 0), variant.spec)
            generation_config.disable_compile = True
            layer.record_past |= bool(generation_config.is_assistant)


def give_variant(module: nn.Module, variant: AttentionVariant) -> None:
    """Make the variant the layer's child; one that reads the layer's input or keeps a state also gets a hook."""
    module.add_module(CHILD, variant)
    if variant.spec.needs_hidden or variant.spec.has_state:
        module.register_forward_pre_hook(capture_layer_input, with_kwargs=True)


def drop_variant(module: nn.Module) -> None:
    """Take the child and its hook out again."""
    module._modules.pop(CHILD, None)
    release_layer_input(module)


def release_layer_input(module: nn.Module) -> None:
    """Take `capture_layer_input` off again."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is capture_layer_input:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module.__dict__.pop(_HIDDEN, None)
            module.__dict__.pop(_TEMPERED, None)
            module.__dict__.pop(_STATE, None)


def check_layer(path: str, module: Any, spec: AttentionSpec) -> None:
    """Raises ValueError if the layer cannot have this variant: it takes its values from another layer, where they are
    tempered already, or it sees a window of keys, or shares keys, which a state cannot follow."""
    if spec.has_state:
        window = _window(module)
        if window is not None:
            raise ValueError(
                f"{path} sees a window of {window} keys, which the state of {spec.name} would not leave out again; "
                "leave this layer out: it needs no more memory for a long text anyway"
            )
        for name in ("is_kv_shared_layer", "store_full_length_kv"):
            if getattr(module, name, False):
                raise ValueError(
                    f"{path} shares keys and values with another layer, and {spec.name} keeps none; leave it out"
                )
    if spec.tempers_values and getattr(module, "is_kv_shared_layer", False):
        raise ValueError(
            f"{path} reads the values of another layer, so {spec.name} cannot temper them; leave this layer out"
        )


def _window(module: Any) -> int | None:
    """How many keys the layer sees, or None for all."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) > index and kinds[index] == "full_attention":
        return None
    if hasattr(module, "sliding_window"):
        window: int | None = module.sliding_window
        return window
    return getattr(config, "sliding_window", None)


class _Tempering:
    """Stands for a layer's cache while the layer runs: values are tempered before they enter it."""

    def __init__(self, cache: Cache, temper: Callable[[Tensor], Tensor]):
        self._cache, self._temper = cache, temper

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key, self._temper(value), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
