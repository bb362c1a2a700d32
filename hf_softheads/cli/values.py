"""Types of option values: what cannot be right is refused before anything is loaded."""

from __future__ import annotations

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_softheads.heads.base import HeadSpec


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


def counts(text: str) -> list[int]:
    """`1,4,16`."""
    return [whole(1)(item) for item in items(text)]


def items(text: str) -> list[str]:
    """`a,b,c`."""
    found = [item.strip() for item in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"needs values with commas between them, got {text!r}")
    return found


def head(text: str) -> HeadSpec:
    """`quantized`, `quantized:bits=4,group=64`, or the JSON of a head variant."""
    from hf_softheads import heads  # noqa: F401 - registers the variants
    from hf_softheads.registry import read_setting, spec_from_dict

    name, _, fields = text.partition(":")
    try:
        plan: Any = json.loads(text)
    except json.JSONDecodeError:
        settings = fields.split(",") if fields else []
        try:
            plan = {"name": name, **dict(read_setting(setting) for setting in settings)}
        except ValueError:
            raise ArgumentTypeError(f"needs NAME:FIELD=VALUE,… or JSON, got {text!r}") from None
    try:
        found: HeadSpec = spec_from_dict("head", plan)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    return found


def _number(text: str, wanted: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"needs a number, got {text!r}") from None
    if not math.isfinite(number) or not fits(number):
        raise ArgumentTypeError(f"needs a finite number {wanted}, got {text}")
    return number
