"""What computes a row map. One file per engine: `RANK`, `TITLE`, `COMPILED`, `supports(call)` and `run(call)`.

Engines are asked by rising rank; the first that supports a call runs it. The last, `query_blocks`, supports them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from hf_softheads.attention.call import Call


class Described(Protocol):
    """Something that computes attention.

    Attributes:
        TITLE: its name for people.
        COMPILED: it is a kernel, as `patch(kernels="require")` demands.
    """

    @property
    def TITLE(self) -> str: ...

    @property
    def COMPILED(self) -> bool: ...


class Engine(Described, Protocol):
    """A module of this package.

    Attributes:
        RANK: engines of a lower rank are asked first.
    """

    @property
    def RANK(self) -> int: ...

    def supports(self, call: Call) -> str | None:
        """Why it cannot run this call; None if it can."""

    def run(self, call: Call) -> Tensor:
        """`weights(scores) @ value`, `(B, H, Q, Dv)`."""


class Choice(NamedTuple):
    """What runs a call, and why those asked before it do not: `(title, reason)`."""

    engine: Described
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"{title}: {reason}" for title, reason in self.refused)
        return f"{self.engine.TITLE} ({reasons})" if reasons else self.engine.TITLE


def choose(call: Call) -> Choice:
    """The engine that runs a call."""
    refused: list[tuple[str, str]] = []
    for engine in ENGINES:
        reason = engine.supports(call)
        if reason is None:
            return Choice(engine, tuple(refused))
        refused.append((engine.TITLE, reason))
    raise AssertionError("the last engine supports every call")


def attend(call: Call) -> Tensor:
    """`weights(scores) @ value` by the engine that is chosen, `(B, H, Q, Dv)`."""
    if call.inputs.trace is not None:
        call.inputs.trace(choose(call))
        return ENGINES[-1].run(call)
    for engine in ENGINES[:-1]:
        if engine.supports(call) is None:
            return engine.run(call)
    return ENGINES[-1].run(call)


def _discover() -> tuple[Engine, ...]:
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    found = [cast(Any, importlib.import_module(f"{__name__}.{name}")) for name in names]
    return tuple(sorted(found, key=lambda engine: engine.RANK))


ENGINES = _discover()
