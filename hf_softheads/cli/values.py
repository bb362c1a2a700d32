"""Types of option values: what cannot be right is refused before anything is loaded."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"needs a whole number, got {text!r}") from None
        if number < least:
            raise ArgumentTypeError(f"needs at least {least}, got {number}")
        return number

    return parse


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, "above 0", lambda number: number > 0)


def at_least_0(text: str) -> float:
    """A finite number, 0 or more."""
    return _number(text, "of at least 0", lambda number: number >= 0)


def items(text: str) -> list[str]:
    """`a,b,c`."""
    found = [item.strip() for item in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"needs values with commas between them, got {text!r}")
    return found


def _number(text: str, wanted: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"needs a number, got {text!r}") from None
    if not math.isfinite(number) or not fits(number):
        raise ArgumentTypeError(f"needs a finite number {wanted}, got {text}")
    return number
