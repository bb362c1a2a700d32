"""What `docs/variants.md` is written from is there."""

from __future__ import annotations

from hf_softheads.registry import variants


def test_every_docstring_has_its_formula_and_source() -> None:
    for name, cls in variants("attention").items():
        first, _, rest = (cls.__doc__ or "").strip().partition("\n")
        assert "`" in first or name == "top_k", name
        assert "Source: " in rest, name
