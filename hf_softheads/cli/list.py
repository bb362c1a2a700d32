"""every variant, its fields and defaults"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from hf_softheads.registry import kinds, variants


def add(parser: argparse.ArgumentParser) -> None:
    # every kind of variant; `sites` knows them all, but needs transformers
    from hf_softheads import attention, classifiers, embeddings, heads, losses  # noqa: F401

    parser.add_argument("kind", nargs="?", choices=kinds())


def run(arguments: argparse.Namespace) -> None:
    from hf_softheads.report.tables import Table

    for kind in [arguments.kind] if arguments.kind else kinds():
        table = Table([kind, "fields", "what it is"])
        for name, cls in variants(kind).items():
            fields = ", ".join(_field(f) for f in dataclasses.fields(cls))
            table.add(name, fields, (cls.__doc__ or "").strip().partition("\n")[0])
        print(table)


def _field(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return field.name
    return f"{field.name}={field.default}"
