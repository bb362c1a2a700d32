"""Type stubs of the packages that find their variants by themselves, so that editors and type checkers see them."""

from __future__ import annotations

import importlib
from pathlib import Path

from sources import ROOT

PACKAGES = ("attention", "classifiers", "heads", "losses")


def stub_files() -> dict[Path, str]:
    """The text of each `__init__.pyi`."""
    return {ROOT / "hf_softheads" / name / "__init__.pyi": _stub(name) for name in PACKAGES}


def _stub(name: str) -> str:
    package = importlib.import_module(f"hf_softheads.{name}")
    lines = [
        f"from {getattr(package, key).__module__} import {key} as {key}" for key in package.__all__
    ]
    return "\n".join(["# Written by `make docs`.", *sorted(lines)]) + "\n"
