"""Run transformers' own common model tests against patched models; see README.md beside this file.

python tests/peer/run.py SOURCE          # writes benchmarks/results/peer.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hf_softheads.files import write_json
from hf_softheads.report.provenance import provenance

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PLANS: dict[str, dict[str, Any]] = {
    "unpatched": {},
    "softmax": {"attention": "softmax"},
    "softpick": {"attention": "softpick"},
    "sigmoid": {"attention": {"name": "sigmoid", "row_bias": "log_n"}},
    "ssmax": {"attention": {"name": "ssmax", "bias": True}},
    "softmax and dense head": {"attention": "softmax", "head": "dense"},
}
BY_DESIGN = {
    "test_attention_outputs": "sets config.output_attentions, which transformers allows for eager attention only; "
    "`model(..., output_attentions=True)` works",
    "test_can_set_attention_dynamically": "a patched model refuses another attention implementation: it would silently "
    "compute softmax again",
    "test_sdpa_can_dispatch_non_composite_models": "demands that a loaded model uses sdpa; a patched one stays patched",
    "test_sdpa_can_dispatch_composite_models": "the same",
    "test_model_get_set_embeddings": "demands that the output embedding is an nn.Linear, which quantizers would grab",
    "test_tied_weights_keys": "a replaced head is not tied to the input embedding",
    "test_can_init_all_missing_weights": "a head without a checkpoint starts from its own distribution",
}
# What a source distribution leaves out of `tests/`; a checkout of the repository has the real ones.
MISSING = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    missing = True\n",
}


def prepare(source: Path, folder: Path) -> list[str]:
    """A copy of transformers' `tests` package with our module in it; the files of `MISSING` that it lacks.

    Raises:
        FileNotFoundError: `source` holds no tests/test_modeling_common.py.
    """
    if not (source / "tests" / "test_modeling_common.py").is_file():
        raise FileNotFoundError(
            f"{source} holds no tests/test_modeling_common.py; give a checkout of transformers, or the folder of the "
            "unpacked `pip download transformers==VERSION --no-binary :all: --no-deps`"
        )
    tests = folder / "tests"
    shutil.copytree(source / "tests", tests, ignore=shutil.ignore_patterns("models", "fixtures"))
    missing = [name for name in MISSING if not (tests / name).exists()]
    for name, stub in MISSING.items():
        file = tests / name
        if name in missing:
            file.parent.mkdir(exist_ok=True)
            file.write_text(stub)
            (file.parent / "__init__.py").touch()
    (tests / "__init__.py").touch()
    shutil.copy(HERE / "models.py", tests / "test_softheads_peer.py")
    shutil.copy(HERE / "plugin.py", folder / "softheads_peer_plugin.py")
    return missing


def run(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Counts, and the failed tests by family."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-p", "softheads_peer_plugin", "--plan", json.dumps(plan) if plan else ""]
    command += [f"--junitxml={report}", "tests/test_softheads_peer.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest wrote no report:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        family = case.attrib["classname"].rpartition("Test_")[2]
        name = case.attrib["name"].partition("[")[0]
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed = found["failed"].setdefault(family, [])
            if name not in failed:
                failed.append(name)
        else:
            found["skipped" if "skipped" in kinds else "passed"] += 1
    report.unlink()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="checkout or unpacked source distribution")
    source = parser.parse_args().source.resolve()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        missing = prepare(source, folder)
        for name, plan in PLANS.items():
            results[name] = {"plan": plan, **run(folder, plan)}
            print(name, results[name], flush=True)
    unexpected = {
        f"{name}: {family}: {test}"
        for name, result in results.items()
        for family, failed in result["failed"].items()
        for test in failed
        if test not in BY_DESIGN
    }
    not_run = dict.fromkeys(missing, f"not in {source.name}; a checkout of transformers has it")
    found = {
        "provenance": provenance(),
        "by_design": BY_DESIGN,
        "not_run": not_run,
        "results": results,
    }
    write_json(ROOT / "benchmarks" / "results" / "peer.json", found)
    print(*sorted(unexpected), sep="\n", file=sys.stderr)
    return 1 if unexpected else 0


if __name__ == "__main__":
    raise SystemExit(main())
