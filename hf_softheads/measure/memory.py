"""How much memory a piece of work takes at its peak."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def can_measure_memory() -> bool:
    """Whether this system says how large a process has been; Linux does."""
    return _CLEAR.exists() and _STATUS.exists()


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Measure the growth of the resident size at its peak: `{"bytes": …}` after the block. Linux only."""
    found: dict[str, int] = {}
    gc.collect()
    _CLEAR.write_text("5")  # the peak starts again from the present size
    before = _status("VmRSS")
    yield found
    found["bytes"] = max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
