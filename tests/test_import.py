"""What `import hf_softheads` loads, and what happens where a package is missing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_softheads.cli import main
from hf_softheads.imports import after_import

ROOT = Path(__file__).parent.parent
# Each is seconds to load, or only one path needs it.
ABSENT = {
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.cpp_extension",
    "triton",
    "transformers.modeling_utils",
    "transformers.quantizers",
    "matplotlib",
    "datasets",
    "peft",
    "pandas",
    "setuptools",
}
STAGES = """
import contextlib, io, json, sys
stages = {"before": list(sys.modules)}
import hf_softheads as sh
stages["import"] = list(sys.modules)
from hf_softheads.cli import main
for command in ("--version", "--help", "list"):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main([command])
    stages[command] = list(sys.modules)
from hf_softheads.registry import kinds
stages["listed"] = kinds()
public = [getattr(sh, name) for name in sh.__all__]
stages["public"] = list(sys.modules)
stages["kinds"] = kinds()
print(json.dumps(stages))

import importlib
from transformers import AutoModelForCausalLM
import torch

def load():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    finite = model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all().item()
    print(type(model.model.layers[0].self_attn.softheads.spec).__name__, finite)

def forget(*packages):
    for name in [name for name in sys.modules if name.startswith(packages)]:
        del sys.modules[name]

load()
auto = importlib.reload(sys.modules["transformers.quantizers.auto"])
load()
forget("hf_softheads")
import hf_softheads
load()
forget("hf_softheads", "transformers.quantizers")
from hf_softheads.checkpoint import SoftheadsQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["softheads"] is SoftheadsQuantizer)
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},  # may import torch at once
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_imports_nothing_before_it_is_needed_and_loads_what_was_saved(tmp_path):
    """A patched folder loads in a process that only imported the package, in whichever order with transformers."""
    from hf_softheads import attention, patch
    from tests.conftest import make_model

    model = patch(make_model("llama"), attention=attention.SSMax())
    model.save_pretrained(tmp_path / "saved")
    first, *loaded = python(STAGES, str(tmp_path / "saved")).splitlines()
    stages = {stage: set(names) for stage, names in json.loads(first).items()}
    own = {"hf_softheads", "hf_softheads.imports", "hf_softheads.version", "__future__"}
    assert stages["import"] - stages["before"] <= own
    assert {"torch", "transformers", "rich"} & stages["--help"] == set()
    assert "hf_softheads.heads.vq" in stages["list"]
    assert "transformers" not in stages["list"]
    assert stages["listed"] == stages["kinds"]
    assert "hf_softheads.patching" in stages["public"]
    assert ABSENT & stages["public"] == set()
    assert loaded == ["SSMax True"] * 3 + ["True"]


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A package of somebody else's, with a module `later` that counts its executions."""
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "__init__.py").write_text("")
    (tmp_path / "stranger" / "later.py").write_text("names = ['a']\n")
    (tmp_path / "stranger" / "first.py").write_text("from stranger.later import names\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "stranger.later"
    for name in [name for name in sys.modules if name.partition(".")[0] == "stranger"]:
        del sys.modules[name]


def registered() -> None:
    sys.modules["stranger.later"].names.append("b")


@pytest.mark.parametrize("by", ["stranger.later", "stranger.first"])
def test_after_an_import(stranger, by):
    after_import(stranger, registered)
    assert stranger not in sys.modules
    importlib.import_module("stranger")
    assert stranger not in sys.modules
    assert importlib.import_module(by).names == ["a", "b"]
    importlib.import_module(stranger)
    assert sys.modules[stranger].names == ["a", "b"]  # once
    loader = sys.modules[stranger].__spec__.loader
    assert isinstance(loader, importlib.machinery.SourceFileLoader)
    assert sys.modules[stranger].__loader__ is loader


def test_after_an_import_that_was_before(stranger):
    later = importlib.import_module(stranger)
    after_import(stranger, registered)
    assert later.names == ["a", "b"]
    assert importlib.reload(later).names == ["a", "b"]


def test_after_an_import_for_two(stranger):
    after_import(stranger, registered)
    after_import(stranger, registered)
    assert importlib.import_module(stranger).names == ["a", "b", "b"]


def test_after_an_import_that_fails(stranger, tmp_path):
    after_import("stranger.none", registered)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'stranger\.none'"):
        importlib.import_module("stranger.none")
    assert importlib.util.find_spec(stranger).loader.get_source(stranger) == "names = ['a']\n"


@pytest.mark.slow
def test_an_unpickled_model_computes_in_a_process_that_only_imported_the_package(tmp_path):
    """Unpickling is what multiprocessing does with a model: nothing of this package is called before its forward."""
    import torch

    from hf_softheads import attention, patch
    from tests.conftest import make_model

    torch.save(patch(make_model("llama"), attention=attention.SSMax()), tmp_path / "model.pt")
    found = python(
        "import hf_softheads, torch, sys\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all().item())",
        str(tmp_path / "model.pt"),
    )
    assert found.split() == ["True"]


@pytest.mark.slow
def test_without_matplotlib_plots_are_refused_at_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["diagnose", "embedded", "--plot", "plots"], ["demo", "--quick"]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == ""  # before anything was measured
        assert (
            err == f"softheads {command[0]}: plots need matplotlib; run `pip install matplotlib`\n"
        )


def test_without_datasets_a_table_is_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "x"}\n')
    assert main(["eval", "embedded", "--data", str(file)]) == 2
    wanted = "softheads eval: datasets is not installed; run `pip install datasets`\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.slow
def test_without_setuptools_a_kernel_says_what_to_install(tmp_path):
    code = (
        "import os, sys; os.environ['XDG_CACHE_HOME'] = sys.argv[1]; sys.modules['setuptools'] = None\n"
        "from hf_softheads import kernels\n"
        "kernels.shutil.which = lambda name: name\n"
        "print(kernels.select('dense').reason)"
    )
    reason = python(code, str(tmp_path))
    assert (
        reason
        == "could not build dense.cpp: setuptools is not installed; run `pip install setuptools`\n"
    )
