"""The `softheads` command as a process: versions, warnings, signals and pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import hf_softheads
from hf_softheads.cli import main


def test_version_and_env(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"softheads {hf_softheads.__version__}\n"
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["hf_softheads"]
    assert {"attention", "quantized", "int8 of oneDNN"} <= found["kernels"].keys()
    for kernel in found["kernels"].values():
        assert (kernel["instructions"] is None) != (kernel["reason"] is None)
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert found["cache"]["folder"] in printed
    assert all(feature in printed for feature in found["processor"]["features"])


def test_warnings_show_no_source_and_only_inside_the_command(monkeypatch):
    shown = []
    before = warnings.formatwarning

    def run(_: object) -> None:
        shown.append(warnings.formatwarning("too little text", UserWarning, "file.py", 3, "code()"))

    monkeypatch.setattr("hf_softheads.cli.list.run", run)
    assert main(["list"]) == 0
    assert shown == ["softheads: warning: too little text\n"]
    assert warnings.formatwarning is before


def started(code: str, *command: str, cwd: Path) -> subprocess.Popen[str]:
    """The command in a process of its own that first runs `code`, which may print `ready` from inside the work."""
    begin = (
        f"import sys, time; import hf_softheads.demo\n{code}\nfrom hf_softheads.cli import main\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", f"{begin}sys.exit(main(sys.argv[1:]))", *command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


STOP_IN_EXPORT = """
from hf_softheads.report import cards
def wait(*_):
    print("ready", flush=True)
    time.sleep(600)
cards.write_card = wait
hf_softheads.demo.repair_head = lambda *_, **__: None
"""


@pytest.mark.parametrize(
    ("command", "number", "word"),
    [
        ("patch embedded --head dense --output a/out", signal.SIGINT, "interrupted"),
        ("patch embedded --head dense --output a/out", signal.SIGTERM, "terminated"),
        pytest.param(
            "demo --quick --output a", signal.SIGINT, "interrupted", marks=pytest.mark.slow
        ),
    ],
)
def test_a_signal_leaves_one_line_and_nothing_half_written(command, number, word, tmp_path):
    with started(STOP_IN_EXPORT, *command.split(), cwd=tmp_path) as process:
        for line in process.stdout:
            if line == "ready\n":
                break
        assert list(tmp_path.glob("a/*.writing/model.safetensors"))  # in the middle of writing
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert [line for line in error.splitlines() if line] == [
        f"softheads {command.split()[0]}: {word}"
    ]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("command", "module", "name"),
    [
        ("list", "argparse", "softheads"),  # before anything of the command line is there
        ("list", "torch", "softheads"),
        ("eval embedded", "transformers", "softheads eval"),
    ],
)
def test_an_interrupt_while_a_package_is_imported(command, module, name, tmp_path):
    (tmp_path / f"{module}.py").write_text(
        "import time\nprint('ready', flush=True)\ntime.sleep(600)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from hf_softheads.cli import main; sys.exit(main())",
            *command.split(),
        ],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert error == f"\n{name}: interrupted\n"


def test_a_reader_that_leaves_is_no_error(tmp_path):
    with started("print('ready', flush=True)", "list", cwd=tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert error == ""
