"""The model that a command names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hf_softheads.text import embedded

if TYPE_CHECKING:
    from hf_softheads.pretrained import NamedModel


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"a Hub id, a folder, or {embedded.NAME!r}")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )


def find(name: str) -> NamedModel:
    """As `pretrained.find`; no progress bars in logs and pipes."""
    from hf_softheads import pretrained
    from hf_softheads.report.provenance import quiet_unless_terminal

    quiet_unless_terminal()
    return pretrained.find(name)


def nbytes(model: Any) -> int:
    """How large the model is when it is saved; patched it is about as large, or smaller."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
