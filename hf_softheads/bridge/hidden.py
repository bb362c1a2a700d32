"""What a variant needs besides query, key and value: the layer's input, and values tempered before they are cached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from hf_softheads.attention.base import AttentionSpec, AttentionVariant
from hf_softheads.attention.call import NewValues

CHILD = "softheads"  # the attention layers' child module that holds a variant and its parameters
_HIDDEN = "softheads_hidden"
_TEMPERED = "softheads_tempered"


def capture_layer_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention layer: keeps the layer's input for `attention_forward`, in the same call. For a
    variant that tempers values, the layer gets its cache in a wrapper that tempers what enters."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    setattr(module, _HIDDEN, hidden)
    variant: Any = getattr(module, CHILD, None)
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


def give_variant(module: nn.Module, variant: AttentionVariant) -> None:
    """Make the variant the layer's child; one that reads the layer's input also gets a hook that keeps it."""
    module.add_module(CHILD, variant)
    if variant.spec.needs_hidden:
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


def check_values(path: str, module: nn.Module, spec: AttentionSpec) -> None:
    """Raises ValueError if the layer takes its values from another layer, where they are tempered already."""
    if spec.tempers_values and getattr(module, "is_kv_shared_layer", False):
        raise ValueError(
            f"{path} reads the values of another layer, so {spec.name} cannot temper them; leave this layer out"
        )


class _Tempering:
    """Stands for a layer's cache while the layer runs: values are tempered before they enter it."""

    def __init__(self, cache: Cache, temper: Callable[[Tensor], Tensor]):
        self._cache, self._temper = cache, temper

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(key, self._temper(value), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
