"""Tables for people: what `describe`, `evaluate` and the command line print."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from hf_softheads.files import human_bytes as human_bytes


@dataclass
class Table:
    """Rows of strings under column names; `str()` aligns them, `markdown()` gives a Markdown table."""

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(self.columns)} columns, got {len(cells)} cells")
        self.rows.append([str(cell) for cell in cells])

    def __str__(self) -> str:
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(self.columns):
            numbers = all(row[number][:1] in "0123456789-–<>≥≤" for row in self.rows)
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        text = io.StringIO()
        Console(file=text, width=140, markup=False, highlight=False).print(table, end="")
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
