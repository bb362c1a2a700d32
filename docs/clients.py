"""The table of other software, read from the marks of the tests in `tests/clients` without running them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from sources import ROOT

from hf_softheads.report.tables import Table

FOLDER = ROOT / "tests" / "clients"


def entries(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and keywords of every `@pytest.mark.client(…)`; with `failing=` the reason of an `xfail` beside it.

    Raises:
        ValueError: a mark has neither `works=` nor `refused=` and `why=`; says which.
    """
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = [mark for mark in node.decorator_list if isinstance(mark, ast.Call)]
        failing = next((_keywords(m) for m in marks if _is(m, "xfail")), None)
        for mark in marks:
            if not _is(mark, "client"):
                continue
            says = _keywords(mark)
            if len(mark.args) != 1 or set(says) not in ({"works"}, {"refused", "why"}):
                raise ValueError(
                    f"{file.name}: {node.name} has a client mark with {sorted(says)}; it takes a name, then works=…, "
                    "or refused=… and why=…"
                )
            if failing is not None:
                says["failing"] = failing["reason"]
            yield ast.literal_eval(mark.args[0]), says


def _is(mark: ast.Call, name: str) -> bool:
    return ast.unparse(mark.func) == f"pytest.mark.{name}"


def _keywords(mark: ast.Call) -> dict[str, str]:
    """The keywords that are plain strings, also such as stand on several lines."""
    plain = [k for k in mark.keywords if k.arg and isinstance(k.value, ast.Constant)]
    values = {str(k.arg): k.value.value for k in plain if isinstance(k.value, ast.Constant)}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def clients_table() -> str:
    """One row a client: what works, and what is refused and why.

    Raises:
        ValueError: a file of tests has no client mark, or a wrong one.
    """
    works: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for file in sorted(FOLDER.glob("test_*.py")):
        found = list(entries(file))
        if not found:
            raise ValueError(f"{file.name} has no test with @pytest.mark.client(…)")
        for name, says in found:
            good, bad = works.setdefault(name, []), refused.setdefault(name, [])
            if "failing" in says:
                what = says.get("works") or f"the refusal of {says['refused']}"
                bad.append(f"*not yet:* {what} ({says['failing']})")
            elif "works" in says:
                good.append(says["works"])
            else:
                bad.append(f"{says['refused']}: {says['why']}")
    table = Table(["client", "what works", "what is refused, and why"])
    for name in sorted(works):
        table.add(name, "<br>".join(works[name]), "<br>".join(refused[name]))
    return table.markdown()
