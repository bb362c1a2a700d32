"""Type stubs of the packages that look their names up when they are used: editors and type checkers do not run them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from sources import ROOT

VARIANTS = ("attention", "classifiers", "embeddings", "heads", "losses")
PACKAGES = ("hf_softheads", *(f"hf_softheads.{name}" for name in VARIANTS))


def stub_files() -> dict[Path, str]:
    """The text of each `__init__.pyi`."""
    return {ROOT.joinpath(*name.split("."), "__init__.pyi"): _stub(name) for name in PACKAGES}


def _stub(name: str) -> str:
    package = importlib.import_module(name)
    lines = [_line(key, getattr(package, key)) for key in package.__all__]
    if hasattr(package, "__version__"):
        lines.append("__version__: str")
    return "\n".join(["# Written by `make docs`.", *sorted(lines)]) + "\n"


def _line(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"from {value.__name__.rpartition('.')[0]} import {name} as {name}"
    return f"from {value.__module__} import {name} as {name}"
