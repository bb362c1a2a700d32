"""Token ids that a model can read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_softheads.bridge.heads import transformers_model


def check_tokens(model: Any, ids: Tensor, labels: Tensor | None = None) -> None:
    """Raise ValueError unless `ids`, and `labels` but for -100, are of the vocabulary; TypeError for no model."""
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
