"""What is written in README and docs is what was measured, and every public name says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

import hf_softheads as sh

ROOT = Path(__file__).parent.parent


@pytest.fixture
def generate(monkeypatch):
    """`docs/generate.py`; its modules have common names, so they are forgotten again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "docs")
    yield importlib.import_module("generate")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == ROOT / "docs":
            del sys.modules[name]


def test_tables_are_those_of_the_results_files(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_results_say_where_they_come_from():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        origin = json.loads(file.read_text())["provenance"]
        assert {"commit", "versions", "machine", "seed"} <= origin.keys(), file.name
        assert origin["versions"]["torch"], file.name


def test_readme_shows_the_two_commands_first():
    first_screen = (ROOT / "README.md").read_text().partition("## Use")[0]
    assert "make demo" in first_screen
    assert "make test" in first_screen
    assert "| dense |" in first_screen


@pytest.mark.parametrize(
    "file", ["README.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]]
)
def test_links_inside_the_repository_exist(file):
    source = ROOT / file
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text()):
        assert (source.parent / target).exists(), f"{file} → {target}"


def test_readme_code_uses_public_names():
    """Every `sh.…` of the README exists, with the arguments it is given."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sh."):
                target = sh
                for part in ast.unparse(node.func).split(".")[1:]:
                    target = getattr(target, part)
                keywords = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(target).bind(*[None] * len(node.args), **keywords)


@pytest.mark.parametrize("name", sh.__all__)
def test_public_names_have_docstrings(name):
    thing = getattr(sh, name)
    assert inspect.getdoc(thing), name


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    for file in [*(ROOT / "hf_softheads").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        tree = ast.parse(file.read_text())
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not imported & {"pickle", "dill", "joblib"}, file
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert not any(k.arg == "trust_remote_code" for k in node.keywords), file
                assert ast.unparse(node.func) != "torch.load", file
