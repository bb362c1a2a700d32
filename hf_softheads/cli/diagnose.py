"""attention sinks, entropy, sparsity, massive activations and the head on text"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hf_softheads.cli import models, texts
from hf_softheads.cli.values import at_least_0, whole


def add(parser: argparse.ArgumentParser) -> None:
    models.add_model(parser)
    parser.add_argument(
        "--data", default="stdlib", help="a text file, or 'stdlib' (held-out modules)"
    )
    parser.add_argument("--window", type=whole(2), default=256, help="tokens per row")
    parser.add_argument("--rows", type=whole(1), default=8, help="number of rows")
    parser.add_argument(
        "--epsilon", type=at_least_0, default=0.3, help="threshold of the sink rates"
    )
    parser.add_argument(
        "--raw", action="store_true", help="do not divide rows by their sum before the sink rate"
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write PNG files too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.files import check_output

    if arguments.plot:
        from hf_softheads.report import plots

        plots.pyplot()  # before the work, if it is not installed
        check_output(arguments.plot, filled=True)
    named = models.find(arguments.model)
    rows = texts.rows(arguments.data, "heldout", named, min(arguments.window, named.window))
    model = named.load(arguments.dtype)
    batch = {"input_ids": rows.input_ids[: arguments.rows]}
    found = sh.diagnose(model, batch, epsilon=arguments.epsilon, renormalise=not arguments.raw)
    print(found.to_json() if arguments.json else found)
    if arguments.plot:
        for file in found.plot(arguments.plot):
            print(f"saved to {file}", file=sys.stderr)
