"""`make mutants`: put every fault of `mutants.py` into a copy of the package, and demand that its test turns red.

A test that passes with its fault in place cannot fail, whatever it says. Nothing in the working tree is edited. Prints
one line per fault; exits with 1 if any survives.

    python -m tests.mutants.run [WORD …]   only faults whose file, test or reason contains one of the words

Every test runs in a process of its own, a fork of one that has imported torch and transformers, but nothing of this
package: importing them takes longer than most of the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
JOBS = 2  # tests at once
SECONDS = 600  # for one test; a fault may make it run forever
_OUTPUT = "output of pytest"


def copied(source: Path, to: Path) -> Path:
    """What a test needs: the package, the tests and their settings."""
    to.mkdir()
    for name in ("hf_softheads", "tests"):
        shutil.copytree(source / name, to / name)
    shutil.copy(source / "pyproject.toml", to)
    return to


def put_in(mutant: Mutant, folder: Path) -> str | None:
    """Write the fault into a copy; the reason if it does not fit."""
    file = folder / mutant.file
    text = file.read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        return f"BROKEN: the old text occurs {count} times"
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
        compiled.unlink()
    return None


def verdict(code: int, output: str) -> str | None:
    """Why a run with a fault in place does not show that the test catches it; None if it does."""
    if code == 0:
        return "SURVIVED: the test passes with the fault in place"
    if code == 1 and re.search(r"\b\d+ failed\b", output):
        return None
    last = output.strip().splitlines()[-1:] or ["no output"]
    return f"BROKEN: exit code {code}, no failed test: {last[0]}"


def import_what_is_slow() -> None:
    """Before the forks; the settings hold for them too."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    os.environ["OMP_NUM_THREADS"] = "1"
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if any(name.partition(".")[0] == "hf_softheads" for name in sys.modules):
        raise RuntimeError(
            "hf_softheads is imported already; the forks would not import their copy"
        )


def fork_pytest(folder: Path, tests: list[str]) -> int:
    """Start a run in a folder that holds a copy, of which it imports the package; the id of its process."""
    process = os.fork()
    if process:
        return process
    code = 3
    try:
        with open(folder / _OUTPUT, "wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)  # for the processes that tests start
        here = {"", str(ROOT)}
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in here)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        import pytest

        imported = "ignore::pytest.PytestAssertRewriteWarning"  # a plugin of pytest's, before it
        code = int(pytest.main(["-x", "-p", "no:cacheprovider", "-W", imported, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run(NamedTuple):
    """A test that is running."""

    mutant: Mutant | None  # None: no fault
    folder: Path
    until: float


def finished(running: dict[int, Run]) -> tuple[Run, int, str]:
    """Wait for one of the processes: its run, exit code and output."""
    while True:
        for process, run in running.items():
            done, status = os.waitpid(process, os.WNOHANG)
            late = time.monotonic() > run.until
            if not done and not late:
                continue
            if not done:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            del running[process]
            output = (run.folder / _OUTPUT).read_text(encoding="utf-8", errors="replace")
            return run, -1 if not done else os.waitstatus_to_exitcode(status), output
        time.sleep(0.05)


def main(words: list[str]) -> int:
    chosen = [
        m for m in MUTANTS if not words or any(w in f"{m.file} {m.test} {m.why}" for w in words)
    ]
    if not chosen:
        print(f"no fault's file, test or reason contains {' or '.join(words)}")
        return 1
    import_what_is_slow()
    running: dict[int, Run] = {}

    def start(folder: Path, tests: list[str], mutant: Mutant | None) -> None:
        limit = SECONDS if mutant else SECONDS * 10
        running[fork_pytest(folder, tests)] = Run(mutant, folder, time.monotonic() + limit)

    with tempfile.TemporaryDirectory() as place:
        clean = copied(ROOT, Path(place) / "clean")
        start(clean, list(dict.fromkeys(m.test for m in chosen)), None)
        _, code, output = finished(running)
        if code != 0:
            print(f"{output}\nThese tests do not pass without a fault; nothing was tried.")
            return 1
        print(f"without a fault: {output.strip().splitlines()[-1]}", flush=True)
        bad, waiting = 0, list(enumerate(chosen))
        while waiting or running:
            problem, mutant = None, None
            if waiting and len(running) < JOBS:
                number, mutant = waiting.pop(0)
                folder = copied(clean, Path(place) / str(number))
                problem = put_in(mutant, folder)
                if problem is None:
                    start(folder, [mutant.test], mutant)
                    continue
            else:
                run, code, output = finished(running)
                mutant, problem = run.mutant, verdict(code, output)
                shutil.rmtree(run.folder)
            assert mutant is not None
            bad += problem is not None
            print(f"{problem or 'caught'} | {mutant.why} | {mutant.test}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults are caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
