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
    """A process of its own, which runs `code` and then the command."""
    path = os.pathsep.join([str(cwd), str(Path(__file__).parents[1])])
    end = "import sys\nfrom hf_softheads.cli import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}\n{end}", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_leaves_one_line_and_nothing_half_written(
    number, word, tmp_path, monkeypatch, capsys
):
    def stop(*_: object) -> None:
        assert list(tmp_path.glob("a/*.writing/model.safetensors"))  # in the middle of writing
        assert signal.getsignal(number) is not signal.SIG_DFL
        signal.raise_signal(number)

    monkeypatch.setattr("hf_softheads.report.cards.write_card", stop)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["patch", "embedded", "--head", "dense", "--output", "a/out"]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert [line for line in error.splitlines() if line] == [f"softheads patch: {word}"]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


STOP_IN_EXPORT = """
import time
import hf_softheads.demo
from hf_softheads.report import cards
def wait(*_):
    print("ready", flush=True)
    time.sleep(600)
cards.write_card = wait
hf_softheads.demo.repair_head = lambda *_, **__: None
"""


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_half_written(tmp_path):
    with started(STOP_IN_EXPORT, "demo", "--quick", "--output", "a", cwd=tmp_path) as process:
        for line in process.stdout:
            if line == "ready\n":
                break
        assert list(tmp_path.glob("a/*.writing/model.safetensors"))  # in the middle of writing
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert [line for line in error.splitlines() if line] == ["softheads demo: interrupted"]
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
    with started("", *command.split(), cwd=tmp_path) as process:
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
