"""Real text that is on every machine: the source of the running interpreter's standard library.

The embedded model was trained on the `train` split; everything measured on it uses `heldout`; what is chosen by trying
(learning rates, presets) is tried on `dev`, which are the tests of the held-out modules. Nothing is downloaded and
nothing of the text is shipped.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "dev", "heldout"]
HELD_OUT_PERCENT = 4
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}
_GENERATED = "_sysconfigdata"  # differs from machine to machine
_TESTS = {"test", "tests", "idle_test"}


def module_of(path: Path) -> str:
    """The module a file belongs to: its first path component; `test/test_json/…` belongs to `json`."""
    parts = [p for p in path.with_suffix("").parts if p not in _TESTS]
    name = parts[0] if parts else path.stem
    return name.removeprefix("test_")


def is_held_out(module: str) -> bool:
    """A stable hash of the module's name, so that the split is the same on every machine and version."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def stdlib_documents(split: Split, *, tests: bool = False) -> list[str]:
    """Source files of one split, sorted by path; `tests` adds the library's own tests where installed.

    Raises:
        FileNotFoundError: this interpreter has no readable standard library sources, or for `dev` no tests.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        test = bool(_TESTS & set(relative.parts))
        if _FOREIGN & set(relative.parts) or (test != (split == "dev") and not (test and tests)):
            continue
        if relative.name.startswith(_GENERATED):
            continue
        if is_held_out(module_of(relative)) != (split != "train"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few test files are in other encodings on purpose
        if text.strip():
            documents.append(text)
    if not documents:
        raise FileNotFoundError(
            f"no Python sources of the {split} split under {root}: this interpreter ships its standard "
            f"library without {'tests' if split == 'dev' else 'sources'}; pass a text file instead"
        )
    return documents
