"""`describe`: what a model is patched with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_softheads import bridge
from hf_softheads.plan import plan_of
from hf_softheads.report.tables import Table, human_bytes


@dataclass(frozen=True)
class Description:
    """What is patched; prints as a table."""

    table: Table
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([str(self.table), *(f"  {note}" for note in self.notes)])


def describe(model: nn.Module) -> Description:
    """Which parts are patched with what: new parameters, bytes, what computes them, and why nothing faster does.

    Raises:
        TypeError: `model` is not a transformers model.
    """
    base = bridge.transformers_model(model)
    plan = plan_of(base)
    table = Table(["part", "variant", "parameters", "bytes", "computed by"])
    notes: list[str] = []
    for site, part in [] if plan is None else plan.by_site():
        rows, more = site.describe(base, part)
        for row in rows:
            table.add(*row[:3], human_bytes(row.nbytes), row.backend)
        notes += more
    if not table.rows:
        count = len(bridge.attention_layers(base))
        notes.append(f"{type(base).__name__} is not patched ({count} attention layers could be)")
    return Description(table, notes)
