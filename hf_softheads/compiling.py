"""What `torch.compile` and `torch.export` are to know of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """A function that is called while tracing, and whose result is a constant of the program.

    `torch.compiler.assume_constant_result` does no more than this, but loads the compiler. A cache belongs inside:
    dynamo looks through the one of `functools`, and warns.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
