"""A layer of a transformers cache that holds a recurrent state instead of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Inputs, State


class _Call(NamedTuple):
    before: State
    tokens: int
    again: Callable[[Inputs], Any]
    inputs: Inputs


class StateLayer(CacheLayerMixin):
    """Stands in a `Cache` for the layer that it replaces; its size does not depend on the length of the text.

    To the masks it looks like a cache with a place for every token, or of the fixed length that it replaces. `crop` is
    exact for tokens that came after `activate_past_recording`, as assisted generation calls it: they are read again.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, spec: AttentionSpec, length: int = -1):
        super().__init__()
        self.spec, self.length, self.state = spec, length, State()
        self.is_compileable = (
            length > 0
        )  # with it, masks are made as other layers of fixed length need them
        self.record_past = False
        self._calls: list[_Call] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the first call makes the state."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values, for the variant to take in."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.length if self.length > 0 else self.state.seen + query_length), 0

    def get_seq_length(self) -> int:
        return self.state.seen

    def get_max_length(self) -> int:
        return self.length

    def new_columns(self, mask: Tensor, tokens: int) -> Tensor:
        """The part of a mask that speaks of the new keys.

        Raises:
            ValueError: it hides a token that the state has taken in, or shows one that was padding.
        """
        seen = self.state.seen
        if mask.shape[-1] < seen + tokens:
            raise ValueError(
                f"{self.spec.name} has a state of all {seen} earlier tokens, and this layer's mask speaks of "
                f"{mask.shape[-1] - tokens}; leave layers with a window of their own out: layers=[…]"
            )
        if seen and self.state.real is not None:
            old = mask[..., -1, :seen]
            shown = (old if old.dtype == torch.bool else old > torch.finfo(old.dtype).min / 2).sum(
                -1
            )
            if not torch.equal(shown.amax(-1), self.state.real.expand(len(shown))):
                raise ValueError(
                    f"the attention mask shows {shown.amax(-1).tolist()} of the tokens before this call, and the state "
                    f"of {self.spec.name} has taken in {self.state.real.tolist()}; it cannot leave any of them out "
                    "again. Give a call the mask of all earlier calls and its own, and no packed sequences with a cache"
                )
        return mask[..., seen : seen + tokens]

    def record(self, again: Callable[[Inputs], Any], inputs: Inputs) -> None:
        """Before a call: keep what `crop` needs to undo a part of it."""
        if self.record_past:
            self._calls.append(_Call(self.state.copy(), inputs.key.shape[2], again, inputs))

    def activate_past_recording(self) -> None:
        self.record_past = True

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens out again, `-n` of them.

        Raises:
            ValueError: a positive number.
            RuntimeError: they came before recording was switched on, or before the last `crop`.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number, of tokens to remove, got {tokens_to_remove}"
            )
        left = -tokens_to_remove
        if left > sum(call.tokens for call in self._calls):
            raise RuntimeError(
                f"{self.spec.name} keeps no keys, so the state cannot give back {left} tokens; call "
                "cache.activate_past_recording() before the tokens enter that may be taken out"
            )
        while left > 0:
            call = self._calls.pop()
            self.state = call.before.copy()
            if call.tokens > left:
                call.again(_first(call.inputs, call.tokens - left, self.state))
            left -= call.tokens
        self._calls.clear()

    def reset(self) -> None:
        self.state = State()
        self._calls.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """It is small: it stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state.apply(change)
        self._calls.clear()


def _first(inputs: Inputs, tokens: int, state: State) -> Inputs:
    """The call for its first tokens only."""
    return inputs.replace(
        query=inputs.query[:, :, :tokens],
        key=inputs.key[:, :, :tokens],
        value=inputs.value[:, :, :tokens],
        keep=None if inputs.keep is None else inputs.keep[:, :, :tokens, :tokens],
        hidden=None if inputs.hidden is None else inputs.hidden[:, :tokens],
        state=state,
    )


def state_layer(cache: Cache, index: int, spec: AttentionSpec) -> StateLayer:
    """The cache's state for a layer; an empty layer of keys and values gives way to a new one.

    Raises:
        ValueError: the layer holds keys and values, or another variant's state.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    replicate: Any = cache.layer_class_to_replicate
    while replicate is not None and len(cache.layers) <= index:
        cache.layers.append(replicate())
    layer: Any = cache.layers[index]
    if isinstance(layer, StateLayer):
        if layer.spec != spec and layer.state.seen:
            raise ValueError(
                f"layer {index} of this cache holds a state of {layer.spec}, and the model has {spec} there; begin "
                "with an empty cache"
            )
        if layer.spec == spec:
            return layer
    elif int(layer.get_seq_length()) > 0:
        raise ValueError(
            f"layer {index} of this {type(cache).__name__} holds keys and values of {int(layer.get_seq_length())} "
            f"tokens ({type(layer).__name__}), which {spec.name} cannot read: its state is made from the first token "
            "on. Begin with an empty cache, or read the text again"
        )
    new = StateLayer(spec, int(layer.get_max_length()))
    new.record_past = bool(getattr(layer, "record_past", False))
    cache.layers[index] = new
    return new
