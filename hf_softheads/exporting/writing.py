"""What a format has prepared: the work is done and nothing is refused any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Writing:
    """The bytes that will be written, about, and what writes them into a new folder."""

    nbytes: int
    write: Callable[[Path], None]
