"""strict perplexity, KL and agreement on text"""

from __future__ import annotations

import argparse

from hf_softheads.cli import models, texts
from hf_softheads.cli.values import whole


def add(parser: argparse.ArgumentParser) -> None:
    models.add_model(parser)
    parser.add_argument(
        "--data", default="stdlib", help="a text file, or 'stdlib' (held-out modules)"
    )
    parser.add_argument("--reference", help="another model over the same vocabulary")
    parser.add_argument(
        "--window", type=whole(2), help="tokens per row; default what the model was trained for"
    )
    parser.add_argument(
        "--stride", type=whole(1), help="how far the window moves; default --window"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh

    named = models.find(arguments.model)
    other = models.find(arguments.reference) if arguments.reference else None
    rows = texts.rows(arguments.data, "heldout", named, arguments.window, arguments.stride)
    model = named.load(arguments.dtype)
    reference = None if other is None else other.load(arguments.dtype)
    found = sh.evaluate(model, rows, reference=reference)
    print(found.to_json() if arguments.json else found)
