"""Timing that survives a noisy machine: everything in one process, interleaved, medians, ratios inside a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_FLUSH = torch.zeros(24 * 2**20, dtype=torch.float32)  # 96 MiB: more than any cache here


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    baseline: str,
    *,
    rounds: int = 25,
    seconds: float = 20.0,
    cold: bool = True,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Time every candidate once a round, in shuffled order; ratios are taken within a round.

    Args:
        cold: read 96 MiB before every sample, so that nothing is left in the caches, as after a model's body ran.
        seconds: stop after the round that ends past this.

    Returns:
        `{name: {"ms": median, "ratio": median of baseline ÷ candidate, "low": …, "high": … (quartiles), "rounds": n}}`.
    """
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    began = time.perf_counter()
    for _ in range(rounds):
        names = list(candidates)
        order.shuffle(names)
        for name in names:
            if cold:
                _FLUSH.add_(1)
            start = time.perf_counter()
            candidates[name]()
            samples[name].append(time.perf_counter() - start)
        if time.perf_counter() - began > seconds:
            break
    found = {}
    for name, times in samples.items():
        ratios = sorted(b / t for b, t in zip(samples[baseline], times, strict=True))
        quarter = len(ratios) // 4
        found[name] = {
            "ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(ratios),
            "low": ratios[quarter],
            "high": ratios[-1 - quarter],
            "rounds": len(times),
        }
    return found
