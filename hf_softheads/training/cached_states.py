"""Hidden states of text, computed before a training of the head alone needs them, and kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads.bridge import SplitModel, check_tokens, transformers_model

CACHE_BYTES = 2**29


class Supply:
    """Hidden states and labels for every step, from parts of the text that follow one another."""

    def __init__(
        self,
        model: nn.Module,
        rows: Tensor | tuple[Tensor, Tensor],
        steps: int,
        batch_size: int,
        seed: int,
    ):
        self.model, self.size, self.seed = model, batch_size, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = 0
        self.held = -1  # which of the parts
        self.parts: list[Tensor] = []
        self.first: list[int] = []  # step from which each part is in use
        if isinstance(rows, tuple) and len(rows) == 2 and len(rows[0]) == len(rows[1]) > 0:
            self.states, self.labels = rows
            self.seen = len(self.labels)
            return
        rows = _checked_rows(model, rows)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        needed = -(-steps * batch_size // (rows.shape[1] - 1))  # windows
        rows = rows[order[:needed]]
        head = SplitModel(transformers_model(model)).head
        width = head.in_features * (rows.shape[1] - 1) * 4
        count = max(1, -(-len(rows) * width // CACHE_BYTES))
        self.parts = list(rows.chunk(count))
        self.first = [steps * i // len(self.parts) for i in range(len(self.parts))]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        if step in self.first:
            self._hold(self.first.index(step))
        return self.draw(self.size)

    def peek(self, count: int) -> tuple[Tensor, Tensor]:
        """Some of the first part, before any step."""
        if self.parts:
            self._hold(0)
        return self.states[:count], self.labels[:count]

    def _hold(self, part: int) -> None:
        if part != self.held:
            self.states = self.labels = torch.empty(0)  # room for the next
            self.states, self.labels = _states_of(self.model, self.parts[part])
            self.seen += len(self.labels)
            self.held = part

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Some of the states at hand, and the tokens that follow."""
        chosen = torch.randint(len(self.labels), (count,), generator=self.generator)
        return self.states[chosen], self.labels[chosen]


def cache_states(
    model: nn.Module, rows: Tensor, *, tokens: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """About `tokens` hidden states `(S, D)` of token windows `(N, W)` and the tokens `(S,)` that follow, on the CPU.

    At most 512 MiB of them, in random order of the windows.

    Raises:
        ValueError: no windows of at least two tokens.
    """
    rows = _checked_rows(model, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return _states_of(model, rows[order], tokens)


def _checked_rows(model: nn.Module, rows: Any) -> Tensor:
    """The rows, if they are windows of the model's tokens. Raises ValueError."""
    if not isinstance(rows, Tensor):
        raise ValueError(
            f"repair needs token windows (N, W ≥ 2) as a tensor, got {type(rows).__name__}; of text, "
            "hf_softheads.text.windows.windows(text, tokenizer).input_ids makes them"
        )
    if rows.ndim != 2 or rows.shape[1] < 2 or not len(rows):
        raise ValueError(f"repair needs token windows (N, W ≥ 2), got {tuple(rows.shape)}")
    check_tokens(model, rows)
    return rows


@torch.no_grad()
def _states_of(model: nn.Module, rows: Tensor, tokens: float = math.inf) -> tuple[Tensor, Tensor]:
    reader = SplitModel(transformers_model(model))
    device = reader.head.weight.device
    kept: list[tuple[Tensor, Tensor]] = []
    size = total = 0
    training = reader.model.training
    reader.model.eval()
    try:
        for batch in tqdm(rows.split(8), desc="hidden states", disable=None, leave=False):
            hidden = reader.hidden(input_ids=batch.to(device))[:, :-1]
            kept.append((hidden.flatten(0, 1).cpu(), batch[:, 1:].flatten()))
            size += hidden.numel() * hidden.element_size()
            total += kept[-1][1].numel()
            if total >= tokens or size >= CACHE_BYTES:
                break
    finally:
        reader.model.train(training)
    return torch.cat([h for h, _ in kept]), torch.cat([y for _, y in kept])
