"""What `import hf_softheads` loads, and what happens where a package is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each is seconds to load, or only one path needs it.
ABSENT = {
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.cpp_extension",
    "triton",
    "transformers.modeling_utils",
    "matplotlib",
    "datasets",
    "peft",
    "pandas",
    "setuptools",
}


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    "what", ["import hf_softheads", "import hf_softheads.cli as c; c._parser()"]
)
def test_import_loads_no_more_than_it_needs(what):
    loaded = json.loads(python(f"{what}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert "hf_softheads.heads.vq" in loaded
    assert ABSENT & set(loaded) == set()


def test_a_saved_model_loads_in_a_process_that_only_imported_the_package(tmp_path):
    """The attention implementation is registered when the first model needs it."""
    from hf_softheads import attention, patch
    from tests.conftest import make_model

    model = patch(make_model("llama"), attention=attention.SSMax())
    model.save_pretrained(tmp_path / "saved")
    found = python(
        "import hf_softheads, torch, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].self_attn.softheads.spec).__name__)\n"
        "print(model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all().item())",
        str(tmp_path / "saved"),
    )
    assert found.split() == ["SSMax", "True"]


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


def without(package: str, *command: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process where a package cannot be imported."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from hf_softheads.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_without_matplotlib_plots_are_refused_at_once(tmp_path):
    for command in (["diagnose", "embedded", "--plot", "plots"], ["demo", "--quick"]):
        done = without("matplotlib", *command[:2], *command[2:])
        assert done.returncode == 2
        assert done.stdout == ""  # before anything was measured
        wanted = f"softheads {command[0]}: plots need matplotlib; run `pip install matplotlib`\n"
        assert done.stderr == wanted


def test_without_datasets_a_table_is_refused_by_name(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "x"}\n')
    done = without("datasets", "eval", "embedded", "--data", str(file))
    assert done.returncode == 2
    assert done.stderr == "softheads eval: datasets is not installed; run `pip install datasets`\n"


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
