"""`make mutants`: put every fault of `mutants.py` into a copy of the package, and demand that its test turns red.

A test that passes with its fault in place cannot fail, whatever it says. Nothing in the working tree is edited. Prints
one line per fault; exits with 1 if any survives.

    python -m tests.mutants.run [WORD …]   only faults whose file, test or reason contains one of the words
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
JOBS = 2  # tests at once
SECONDS = 300  # for one test; a fault may make it run forever


def copied(source: Path, to: Path) -> Path:
    """What a test needs: the package, the tests and their settings."""
    for name in ("hf_softheads", "tests"):
        shutil.copytree(source / name, to / name)
    shutil.copy(source / "pyproject.toml", to)
    return to


def pytest(folder: Path, *tests: str) -> tuple[int, str]:
    """Exit code and output of a run in a folder that holds a copy, of which it imports the package."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return -1, f"no end within {SECONDS} s"
    return done.returncode, done.stdout + done.stderr


def verdict(code: int, output: str) -> str | None:
    """Why a run with a fault in place does not show that the test catches it; None if it does."""
    if code == 0:
        return "SURVIVED: the test passes with the fault in place"
    if code == 1 and re.search(r"\b\d+ failed\b", output):
        return None
    last = output.strip().splitlines()[-1:] or ["no output"]
    return f"BROKEN: exit code {code}, no failed test: {last[0]}"


def tried(mutant: Mutant, clean: Path) -> str | None:
    """Run the fault's test with the fault in a copy of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = copied(clean, Path(name))
        file = folder / mutant.file
        text = file.read_text(encoding="utf-8")
        if (count := text.count(mutant.old)) != 1:
            return f"BROKEN: the old text occurs {count} times"
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
            compiled.unlink()
        return verdict(*pytest(folder, mutant.test))


def main(words: list[str]) -> int:
    chosen = [
        m for m in MUTANTS if not words or any(w in f"{m.file} {m.test} {m.why}" for w in words)
    ]
    with tempfile.TemporaryDirectory() as name:
        clean = copied(ROOT, Path(name))
        code, output = pytest(clean, *dict.fromkeys(m.test for m in chosen))
        if code != 0:
            print(output)
            print("These tests do not pass without a fault; nothing was tried.")
            return 1
        print(f"without a fault: {output.strip().splitlines()[-1]}", flush=True)
        bad = 0
        with ThreadPoolExecutor(JOBS) as pool:
            found = pool.map(lambda m: tried(m, clean), chosen)
            for mutant, problem in zip(chosen, found, strict=True):
                bad += problem is not None
                print(f"{problem or 'caught'} | {mutant.why} | {mutant.test}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults are caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
