"""Token ids that a model can read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_softheads.bridge.attention import language_modules
from hf_softheads.bridge.heads import transformers_model


def check_tokens(model: Any, ids: Tensor, labels: Tensor | None = None) -> None:
    """Are `ids`, and `labels` but for -100, of the vocabulary, and no more in a row than the model has positions for?

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: they are not.
    """
    base = transformers_model(model)
    known = getattr(base.get_input_embeddings(), "num_embeddings", None)
    for name, tensor in (("token ids", ids), ("labels", labels)):
        if tensor is None:
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(f"{name} are whole numbers, got a tensor of {tensor.dtype}")
        if not tensor.numel():
            raise ValueError(f"there are no {name}: got an empty tensor {tuple(tensor.shape)}")
        low, high = int(tensor.min()), int(tensor.max())
        if name == "labels" and low == -100:
            low = int(tensor.masked_fill(tensor == -100, 0).min())
        if low < 0 or (known is not None and high >= known):
            raise ValueError(
                f"{name} from {low} to {high} were given, but {type(base).__name__} knows 0 to "
                f"{'…' if known is None else known - 1}; is the tokenizer another model's?"
            )
    positions = _positions(base)
    if positions is not None and ids.shape[-1] > positions:
        raise ValueError(
            f"rows of {ids.shape[-1]} tokens were given, but {type(base).__name__} has a table of {positions} "
            "positions; give a smaller window"
        )


def _positions(model: Any) -> int | None:
    """How many tokens a model whose positions are rows of a table can read; None for other models."""
    within = language_modules(model)
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        table = isinstance(module, nn.Embedding) and (name == "wpe" or "position" in name)
        if table and (within is None or module in within):
            limit: int | None = getattr(
                model.config.get_text_config(), "max_position_embeddings", None
            )
            return limit
    return None
