"""The splits of the standard library: by module, disjoint, `dev` made of tests alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_softheads.text import stdlib_corpus as corpus


def library(root: Path, monkeypatch: pytest.MonkeyPatch, *, tests: bool) -> set[str]:
    """A library of 200 modules, each file holding its own path; the held-out modules."""
    names = [f"module{i}" for i in range(200)]
    paths = [f"{name}.py" for name in names]
    if tests:
        paths += [f"test/test_{name}.py" for name in names]
    for path in [*paths, "site-packages/foreign.py"]:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(path)
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(root))
    return {name for name in names if corpus.is_held_out(name)}


def test_splits_are_disjoint_and_follow_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = library(tmp_path, monkeypatch, tests=True)
    assert 0 < len(held) < 40
    assert set(corpus.stdlib_documents("heldout")) == {f"{m}.py" for m in held}
    assert set(corpus.stdlib_documents("dev")) == {f"test/test_{m}.py" for m in held}
    train = corpus.stdlib_documents("train", tests=True)
    assert len(train) == 2 * (200 - len(held))
    assert len(corpus.stdlib_documents("train")) == 200 - len(held)
    assert not set(train) & {*corpus.stdlib_documents("heldout", tests=True)}


def test_a_library_without_tests_has_no_dev_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path, monkeypatch, tests=False)
    with pytest.raises(FileNotFoundError, match="library without tests; pass a text file"):
        corpus.stdlib_documents("dev")
