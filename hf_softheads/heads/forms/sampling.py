"""Drawing one token from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature > 0`."""
    if not temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {temperature}; for the best token use topk(hidden, 1)"
        )


def gumbel_max(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index per row, drawn from `softmax(logits)`, `(…)`."""
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - noise.log_()).argmax(-1)
