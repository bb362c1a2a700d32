"""The list of faults fits the package and the tests of today. `make mutants` runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mutants.mutants import MUTANTS, Mutant
from tests.mutants.run import main, verdict

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.why.replace(" ", "-"))
def test_the_old_text_and_the_test_are_there(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.new != mutant.old
    compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
    file, _, name = mutant.test.partition("::")
    function = name.partition("[")[0]
    assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_no_fault_is_listed_twice() -> None:
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS)
    assert len({m.why for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("code", "output", "problem"),
    [
        (1, "1 failed, 3 passed in 2s", None),
        (0, "4 passed in 2s", "SURVIVED"),
        (1, "1 error in 2s", "BROKEN"),
        (2, "1 error during collection", "BROKEN"),
        (4, "no tests ran", "BROKEN"),
        (5, "", "BROKEN"),
        (-1, "no end", "BROKEN"),
    ],
)
def test_only_a_failed_test_catches_a_fault(code: int, output: str, problem: str | None) -> None:
    found = verdict(code, output)
    assert found is None if problem is None else str(found).startswith(problem)


def test_a_word_that_no_fault_contains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--no-such-word"]) == 1
    assert capsys.readouterr().out == "no fault's file, test or reason contains --no-such-word\n"
