"""Imports between the rooms of the package run downwards, as the code's own import statements tell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_softheads"

# Rooms from the bottom up; a room may import from those below it. Rooms of one line do not know each other.
FLOORS = (
    ("registry", "files", "bitpack", "compiling", "hardware", "imports", "version"),
    ("kernels", "text", "losses", "classifiers"),
    ("heads", "attention"),
    ("embeddings",),
    ("bridge",),
    ("sites", "training", "pretrained", "decoding"),
    ("config",),
    ("plan",),
    ("patching",),
    ("checkpoint", "report"),
    ("measure",),
    ("exporting",),
    ("__init__",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """`hf_softheads.heads.fit.kmeans` → `heads`; `hf_softheads` itself → `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path, *, at_import: bool = False) -> Iterator[str]:
    """Every module of the package that a file names, in functions and under TYPE_CHECKING too; `at_import` leaves those
    out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            module = node.module or ""
            names = [_submodule(module, alias.name) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "hf_softheads")


def _submodule(module: str, name: str) -> str:
    """`from module import name`: the submodule where there is one, else the module."""
    path = PACKAGE.parent.joinpath(*module.split("."), name)
    return f"{module}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else module


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_from_below(file: Path) -> None:
    own = room_of(module_of(file))
    assert own in FLOOR, f"{own} has no place in FLOORS"
    for module in imported(file):
        other = room_of(module)
        if other != own:
            assert FLOOR[other] < FLOOR[own], f"{own} imports {module}, which is not below it"


def test_no_circle_of_files() -> None:
    graph = {
        module_of(file): {m for m in imported(file, at_import=True) if m != module_of(file)}
        for file in FILES
        if file.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_a_variant_names_no_engine() -> None:
    for file in (PACKAGE / "attention").glob("*.py"):
        engines = [m for m in imported(file) if m.startswith("hf_softheads.attention.engines.")]
        assert not engines, f"{file.name} names {engines}"


def test_engines_know_no_variant() -> None:
    for file in (PACKAGE / "attention" / "engines").glob("*.py"):
        others = {m for m in imported(file) if m.startswith("hf_softheads.attention.")}
        own = {m for m in others if m.startswith("hf_softheads.attention.engines")}
        assert others - own <= {"hf_softheads.attention.call"}, file.name


def test_patching_and_loading_know_no_site_by_name() -> None:
    for name in ("patching", "checkpoint", "config"):
        for module in imported(PACKAGE / f"{name}.py"):
            assert not module.startswith(("hf_softheads.heads.base", "hf_softheads.attention"))
            assert module in ("hf_softheads.sites", "hf_softheads.sites.base") or not (
                module.startswith("hf_softheads.sites")
            )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 350
