"""Timing that survives a noisy machine: everything in one process, interleaved, medians, ratios inside a round."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# 96 MiB, more than any cache here; of zeros there would be a single page
_FLUSH = torch.ones(24 * 2**20)

_NEAR = 10  # rounds: two seconds


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    baseline: str,
    *,
    rounds: int = 25,
    seconds: float = 20.0,
    cold: bool = True,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Time every candidate once a round, in shuffled order; ratios are taken within a round, or the nearest one.

    A sample whose threads had to wait for a core that another process held is dropped: with two threads in a barrier
    one such wait costs a scheduler slice, fifty times what a small head takes. Where the baseline's own sample was
    dropped, that of the nearest round stands in, at most `_NEAR` rounds away.

    Args:
        rounds: stop when every candidate has so many clean samples.
        cold: read 96 MiB before every sample, so that nothing is left in the caches, as after a model's body ran.
        seconds: stop after the round that ends past this.
        clock: `time.thread_time`, with one torch thread, counts work and not waiting: nothing is dropped then.

    Returns:
        `{name: {"ms": median, "fastest": ms, "ratio": median of baseline ÷ candidate, "low": …, "high": … (quartiles),
        "rounds": n, "dropped": n}}`.

    Raises:
        RuntimeError: other processes left fewer than three clean pairs.
    """
    order = random.Random(seed)
    clean: list[dict[str, float]] = []
    dropped = dict.fromkeys(candidates, 0)
    for function in candidates.values():
        function()
    began = time.perf_counter()
    while min(len(_pairs(name, baseline, clean)) for name in candidates) < rounds:
        names = list(candidates)
        order.shuffle(names)
        taken: dict[str, float] = {}
        for name in names:
            if cold:
                _FLUSH.sum()
            waited = _waited()
            start = clock()
            candidates[name]()
            taken[name] = clock() - start
            if clock is time.perf_counter and _waited() - waited > 0.02 * taken[name]:
                del taken[name]
                dropped[name] += 1
        clean.append(taken)
        if time.perf_counter() - began > seconds:
            break
    return {name: _summary(name, baseline, clean, dropped[name]) for name in candidates}


def _summary(
    name: str, baseline: str, clean: list[dict[str, float]], dropped: int
) -> dict[str, float]:
    pairs = _pairs(name, baseline, clean)
    if len(pairs) < 3:
        raise RuntimeError(
            f"{name}: {dropped} of {len(clean)} samples waited for a core; the machine is too busy"
        )
    ratios = sorted(base / mine for base, mine in pairs)
    quarter = len(ratios) // 4
    return {
        "ms": 1e3 * statistics.median(taken[name] for taken in clean if name in taken),
        "fastest": 1e3 * min(taken[name] for taken in clean if name in taken),
        "ratio": statistics.median(ratios),
        "low": ratios[quarter],
        "high": ratios[-1 - quarter],
        "rounds": len(ratios),
        "dropped": dropped,
    }


def _pairs(name: str, baseline: str, clean: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Samples of the baseline and of a candidate that were taken soon after each other."""
    known = [i for i, taken in enumerate(clean) if baseline in taken]
    pairs = []
    for i, taken in enumerate(clean):
        if name in taken and known:
            nearest = min(known, key=lambda k: abs(k - i))
            if abs(nearest - i) <= _NEAR:
                pairs.append((clean[nearest][baseline], taken[name]))
    return pairs


def _waited() -> float:
    """Seconds that this process's threads have been runnable without a core; 0 where the system does not say."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(task.read_text().split()[1])
    return total / 1e9
