"""What the tables are made of: results files, docstrings of variants, and where the figures are from."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from hf_softheads.report.cards import REPOSITORY

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def where(found: Any, up: str = f"{REPOSITORY}/tree/main/") -> str:
    """Where figures are from; README is shown on package indexes too, so its link is a whole one."""
    origin = found["provenance"]
    machine, versions = origin["machine"], origin["versions"]
    return (
        f"([results]({up}benchmarks/results), {machine['cores']} cores {machine['cpu']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']})"
    )


def docstring(cls: type) -> tuple[str, str]:
    """The formula (first line) and the source of a variant, for a Markdown table."""
    lines = inspect.getdoc(cls).splitlines()
    source = next((line for line in lines if line.startswith("Source: ")), "Source: –")
    ends = r"(?<!eq)[.;:] |, the default|\.$"
    return tuple(text.replace("|", r"\|") for text in (lines[0], re.split(ends, source[8:])[0]))


def written(spec: dict[str, Any]) -> str:
    """A spec as one writes it, without what is None."""
    fields = [
        f"{name}={written(value) if isinstance(value, dict) else value}"
        for name, value in spec.items()
        if name != "name" and value is not None and value != {"name": "dense"}
    ]
    return f"{spec['name']}({', '.join(fields)})"


def milliseconds(row: dict[str, Any]) -> str:
    return f"{row['ms']:.2f} ms"


def faster(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.1f}× faster" if row["ratio"] > 1 else "–"
