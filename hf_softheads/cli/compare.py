"""quality, sizes and speed of several models beside each other"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_softheads.cli import models, texts
from hf_softheads.cli.values import whole

if TYPE_CHECKING:
    from hf_softheads.pretrained import NamedModel

_FILES = "comparison.html", "comparison.json"


def add(parser: argparse.ArgumentParser) -> None:
    models.add_model(parser)
    parser.add_argument(
        "others",
        nargs="+",
        metavar="other",
        help="Models over the same vocabulary, which are compared with the first one.",
    )
    parser.add_argument(
        "--data",
        default="stdlib",
        help="A text file, or 'stdlib', held-out modules of Python's library, which is the default.",
    )
    parser.add_argument(
        "--tokens",
        type=whole(2),
        default=16_384,
        help="Maximum number of tokens to measure quality on. The default is 16384.",
    )
    parser.add_argument(
        "--window",
        type=whole(2),
        help="Tokens per row. The default is what the first model was trained for, at most 1024.",
    )
    parser.add_argument(
        "--rounds",
        type=whole(1),
        default=5,
        help="Rounds in which speed is measured, each model beside the first one. The default is 5.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"Write {' and '.join(_FILES)} to a folder. By default only the table is printed.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.epilog = "example: softheads compare embedded packed file --output comparison"


def run(arguments: argparse.Namespace) -> None:
    from hf_softheads.files import check_output, filling, write_json
    from hf_softheads.measure.compare import Candidate, compare
    from hf_softheads.report.page import page

    if arguments.output is not None:
        check_output(arguments.output, filled=True)
    names = [arguments.model, *arguments.others]
    if len(set(names)) < len(names):
        raise ValueError(f"compare needs different models, got {' '.join(names)}")
    found = [models.find(name) for name in names]
    for other in found[1:]:
        _check_vocabulary(found[0], other)
    rows = texts.rows(arguments.data, "heldout", found[0], arguments.window).head(arguments.tokens)
    candidates = [
        Candidate(name, partial(named.load, arguments.dtype), named.nbytes())
        for name, named in zip(_short(names), found, strict=True)
    ]
    result = compare(candidates, rows, rounds=arguments.rounds)
    print(result.to_json() if arguments.json else result)
    if arguments.output is not None:
        plain = result.to_dict()
        about = {"data": arguments.data, **plain["settings"], "provenance": plain["provenance"]}
        text = page("Comparison of models", result.table(), plain["rows"], about)
        with filling(arguments.output) as fresh:
            (fresh / _FILES[0]).write_text(text, encoding="utf-8")
            write_json(fresh / _FILES[1], plain)


def _short(names: list[str]) -> list[str]:
    """The last parts of the names where these differ."""
    last = [Path(name).name or name for name in names]
    return last if len(set(last)) == len(last) else names


def _check_vocabulary(first: NamedModel, other: NamedModel) -> None:
    """Raise ValueError unless both read and write the same tokens."""
    sizes = [named.config.get_text_config().vocab_size for named in (first, other)]
    sample = "def f(x):\n    return x ** 2  # 1234 naïve, it's 東京"
    ids = [named.tokenizer(sample).input_ids for named in (first, other)]
    if sizes[0] != sizes[1] or ids[0] != ids[1]:
        raise ValueError(
            f"{other.name!r} has another vocabulary than {first.name!r} ({sizes[1]:,} and {sizes[0]:,} tokens, or text "
            "is cut differently); models over the same one can be compared"
        )
