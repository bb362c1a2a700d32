"""A language model as two steps: tokens to hidden states, hidden states to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_softheads.bridge.heads import (
    active_head,
    base_model,
    head_as,
    is_hooked,
    transformers_model,
    vocabulary,
)
from hf_softheads.bridge.kinds import how_to_load
from hf_softheads.bridge.logit_transform import logit_transform
from hf_softheads.heads.base import Head, LogitTransform

FEW = 8  # tokens of a trial run


class SplitModel:
    """A causal model as two steps: tokens to last hidden states, hidden states to the model's logits.

    The hidden states are what the model's own forward hands to its head, whatever the family; the head is not run.

    Raises:
        TypeError: there is no transformers model inside `model`.
        ValueError: the model has no head, or changes its logits after the head in an unknown way.
    """

    def __init__(self, model: nn.Module):
        transformers_model(model)
        self.model = model
        head = active_head(model)
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output embedding; {how_to_load(base_model(model).config)}"
            )
        self.head = head
        transform = head.transform if isinstance(head, Head) else logit_transform(base_model(model))
        if transform is None:
            raise ValueError(
                f"{type(base_model(model)).__name__} changes its logits after its head by something else than scaling "
                "and tanh; its distribution cannot be computed from hidden states"
            )
        self.transform = transform
        self.vocab = vocabulary(head)
        self._unchecked = is_hooked(head)

    def hidden(self, **inputs: Any) -> Tensor:
        """Hidden states `(B, T, D)` of a batch, with gradients where they are enabled.

        Raises:
            ValueError: a hook on the head changes what it is given, so that the two steps are not the model.
        """
        if self._unchecked:
            self._check_hooks(few_tokens(inputs))
            self._unchecked = False
        return self._hidden(inputs)

    def _hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        captured: list[Tensor] = []

        def capture(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            captured.append(hidden)
            return hidden[..., :1]  # cheap, and enough for what a family does to its logits

        with head_as(self.model, capture):
            self.model(**inputs, use_cache=False)
        return captured[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits `(…, V)` in fp32, computed in the model's dtype."""
        return self.transform(self.head(hidden).float())

    @torch.no_grad()
    def _check_hooks(self, few: Mapping[str, Any]) -> None:
        base = base_model(self.model)
        training = base.training
        base.eval()
        try:
            logits = getattr(self.model, "_orig_mod", self.model)(**few, use_cache=False).logits
            _check_same(base, logits, self.logits(self._hidden(few)), "its head run by itself")
        finally:
            base.train(training)


def few_tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first tokens of a batch's first row, for encoder and decoder, and the call's switches: for a trial run."""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    tokens = {name: batch[name][:1, :FEW] for name in names if batch.get(name) is not None}
    switches = {k: v for k, v in batch.items() if isinstance(v, bool) and k != "use_cache"}
    return {**switches, **tokens, "return_dict": True}


@torch.no_grad()
def check_transform(model: nn.Module, transform: LogitTransform, batch: Mapping[str, Any]) -> Any:
    """Compare the head's scores after `transform` with the model's own logits on a few tokens; its output on them.

    Raises:
        ValueError: they differ.
    """
    base = base_model(model)
    raw: list[Tensor] = []

    def own(hidden: Tensor) -> Tensor:
        raw.append(original(hidden))
        return raw[-1]

    training = base.training
    base.eval()
    try:
        # with its wrappers, which gather sharded parameters; but nothing is compiled for so few tokens
        with head_as(model, own) as original:
            output = getattr(model, "_orig_mod", model)(**batch, use_cache=False)
    finally:
        base.train(training)
    after = f"its head's scores after {transform}"
    _check_same(base, output.logits, transform(raw[0].float()), after)
    return output


def _check_same(base: Any, logits: Tensor, expected: Tensor, after: str) -> None:
    error = float((logits.float() - expected).abs().max())
    if not error <= 1e-2 * float(expected.abs().max()) + 1e-4:
        raise ValueError(
            f"the logits of {type(base).__name__} differ by {error:.3g} from {after}: it does something around its "
            "head (a hook on the head counts too) that is not understood, so what is computed from hidden states would "
            "be another model's; take the hook off, or merge what it does into the weight"
        )
