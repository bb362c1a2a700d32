"""Times of a model's steps, the head apart from the body, with other modules in its places."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Parts = dict[str, nn.Module]
"""What a variant puts into a model, by path."""


@contextlib.contextmanager
def with_parts(base: Any, parts: Parts) -> Iterator[nn.Module]:
    """The model with these modules in it; gives its head."""
    before = {path: base.get_submodule(path) for path in parts}
    try:
        for path, module in parts.items():
            base.set_submodule(path, module)
        yield base.get_output_embeddings()
    finally:
        for path, module in before.items():
            base.set_submodule(path, module)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one call of the model, and those of them that the head took."""

    whole: float
    head: float

    @property
    def body(self) -> float:
        return self.whole - self.head


class StepClock:
    """Times calls of a model and the head inside them."""

    def __init__(self, base: Any, head: nn.Module):
        self.base, self.head, self.within = base, head, 0.0
        few = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.last: dict[str, Any] = {"logits_to_keep": 1} if few else {}

    def now(self) -> float:
        if self.base.device.type == "cuda":
            torch.cuda.synchronize(self.base.device)
        return time.perf_counter()

    def __enter__(self) -> StepClock:
        self.hooks = [
            self.head.register_forward_pre_hook(self._enter),
            self.head.register_forward_hook(self._leave),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _enter(self, *_: object) -> None:
        self.began = self.now()

    def _leave(self, *_: object) -> None:
        self.within += self.now() - self.began

    def step(self, ids: Tensor, cache: Any) -> tuple[StepTime, Tensor, Any]:
        """Times of one call, the next tokens `(B, 1)` and the cache."""
        self.within = 0.0
        began = self.now()
        output = self.base(ids, past_key_values=cache, use_cache=True, **self.last)
        whole = self.now() - began
        following = output.logits[:, -1].argmax(-1, keepdim=True)
        return StepTime(whole, self.within), following, output.past_key_values


@dataclass(frozen=True)
class Sample:
    """One prompt and the tokens written after it."""

    prefill: StepTime
    decode: StepTime  # the median one


def sample(base: Any, parts: Parts, ids: Tensor, steps: int) -> Sample:
    """Read a prompt with these modules in the model and write `steps` tokens greedily."""
    with with_parts(base, parts) as head, StepClock(base, head) as clock:
        prefill, token, cache = clock.step(ids, None)
        found = []
        for _ in range(steps):
            step, token, cache = clock.step(token, cache)
            found.append(step)
    return Sample(prefill, sorted(found, key=lambda step: step.whole)[len(found) // 2])
