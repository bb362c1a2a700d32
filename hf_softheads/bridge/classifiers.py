"""A sequence classifier's last module: finding it, and what a pooling one sees of the model's hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_softheads.classifiers.base import PooledClassifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = ("score", "classifier", "classification_head", "logits_proj")


def classifies(model: PreTrainedModel) -> bool:
    """Is it a sequence classifier?"""
    return type(model).__name__.endswith("ForSequenceClassification")


def find_classifier(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Name and module of the classifier.

    Raises:
        ValueError: the model is no sequence classifier.
    """
    if classifies(model):
        for name in _NAMES:
            module = getattr(model, name, None)
            if isinstance(module, nn.Module):
                return name, module
    raise ValueError(
        f"{type(model).__name__} is no sequence classifier with one of {', '.join(_NAMES)}; load the model with "
        "AutoModelForSequenceClassification"
    )


def active_classifier(model: Any) -> PooledClassifier | None:
    """The pooling classifier that will run, PEFT's copy where one is active; None if there is none."""
    for name in _NAMES:
        module = model._modules.get(name)
        copies = getattr(module, "modules_to_save", None)
        if copies is not None:
            names = () if module.disable_adapters else module.active_adapters
            chosen = next((a for a in names if a in copies), None)
            module = copies[chosen] if chosen else module.original_module
        if isinstance(module, PooledClassifier):
            return module
    return None


@contextlib.contextmanager
def pooling(model: PreTrainedModel, classifier: PooledClassifier) -> Iterator[None]:
    """Within the context the model's pooling classifier sees the backbone's last hidden states."""
    pad = model.config.get_text_config().pad_token_id

    def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = output[0]
        classifier.seen = hidden, _real_tokens(hidden, args, kwargs, pad)

    handle = model.base_model.register_forward_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        classifier.seen = None


def _real_tokens(
    hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], pad: int | None
) -> Tensor:
    """`(B, T)`, false for padding: by the attention mask, else by the padding token as the family itself does it."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
        return mask.bool().to(hidden.device)
    if isinstance(mask, Tensor):
        raise ValueError(
            f"softpool needs an attention mask (batch, tokens) = {tuple(hidden.shape[:2])}, got {tuple(mask.shape)}"
        )
    if isinstance(tokens, Tensor) and pad is not None:
        return (tokens != pad).to(hidden.device)
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
