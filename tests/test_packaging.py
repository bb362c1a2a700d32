"""What is installed: the built packages hold everything, the metadata is whole, type checkers see the variants."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import hf_softheads
from hf_softheads.report.cards import REPOSITORY

ROOT = Path(__file__).parent.parent
METADATA = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the wheel and the sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hf_softheads", source / "hf_softheads", ignore=ignored)
    code = "from setuptools import build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, timeout=300
    )
    return folder


def needed() -> set[str]:
    """Everything under the package that is no cache."""
    files = (p for p in (ROOT / "hf_softheads").rglob("*") if p.is_file())
    return {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}


def test_wheel_and_sdist_hold_the_whole_package(built):
    assert {"hf_softheads/py.typed", "hf_softheads/heads/__init__.pyi"} <= needed()
    assert any(name.endswith(".hpp") for name in needed())
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert needed() - names == set()
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert needed() - inside == set()


@pytest.mark.slow
def test_command_runs_from_the_wheel(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    entry = next(tmp_path.glob("*.dist-info/entry_points.txt")).read_text()
    assert "softheads = hf_softheads.cli:main" in entry
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command, wanted in ((["list", "head"], "codes"), (["env"], "kernel transform_coded")):
        done = subprocess.run(
            [sys.executable, "-m", "hf_softheads", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert wanted in done.stdout


def test_metadata_and_cards_name_one_repository():
    assert f'Repository = "{REPOSITORY}"' in METADATA
    for minor in range(10, 14):
        assert f'"Programming Language :: Python :: 3.{minor}"' in METADATA


def test_links_of_the_readme_work_on_a_package_index():
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert targets
    for target in targets:
        assert target.startswith("https://"), target
        if target.startswith(REPOSITORY):
            _, path = re.fullmatch(r"/(blob|tree)/main/(.*)", target[len(REPOSITORY) :]).groups()
            assert (ROOT / path).exists(), target


SNIPPET = """
import hf_softheads as sh

sh.heads.VQ(codes=3)
sh.attention.attend
sh.losses.KL()
sh.classifiers.SoftPool()
{line}
"""


ERRORS = {  # of a line, and what is said of it
    "": None,
    'sh.heads.VQ(codes="x")': 'Argument "codes" to "VQ" has incompatible type "str"',
    "sh.heads.VQQ(codes=3)": 'Module has no attribute "VQQ"',
    "sh.export(None, folder=3)": 'Argument "folder" to "export" has incompatible type "int"',
    "sh.pach": 'Module has no attribute "pach"',
}
# only this package's types matter here; following torch's would take minutes
MYPY = """
[mypy]
strict = true
[mypy-torch.*,transformers.*,safetensors.*,tqdm.*,accelerate.*,rich.*]
follow_imports = skip
ignore_missing_imports = true
[mypy-hf_softheads.*]
follow_imports = silent
"""


@pytest.mark.slow
def test_type_checkers_see_the_variants(tmp_path):
    pytest.importorskip("mypy")
    files = [f"snippet_{number}.py" for number in range(len(ERRORS))]
    for file, line in zip(files, ERRORS, strict=True):
        (tmp_path / file).write_text(SNIPPET.format(line=line))
    (tmp_path / "mypy.ini").write_text(MYPY)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *files],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(hf_softheads.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    for file, error in zip(files, ERRORS.values(), strict=True):
        said = [line for line in done.stdout.splitlines() if line.startswith(f"{file}:")]
        assert len(said) == (error is not None), said
        assert error is None or error in said[0]
