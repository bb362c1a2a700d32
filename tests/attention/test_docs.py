"""`docs/variants.md` says what the classes say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from hf_softheads.registry import variants

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("block", ["attention", "attention speed", "training free"])
def test_tables_are_up_to_date(block: str) -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    file, make = generator["BLOCKS"][block]
    fresh = f"<!-- begin:{block} -->\n{make()}\n<!-- end:{block} -->"
    assert fresh in file.read_text(), "run `make docs`"


def test_every_docstring_has_its_formula_and_source() -> None:
    for name, cls in variants("attention").items():
        first, _, rest = (cls.__doc__ or "").strip().partition("\n")
        assert "`" in first or name == "top_k", name
        assert "Source: " in rest, name
