"""the head that loses least within a budget, and the table of those tried"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_softheads.cli import models, texts
from hf_softheads.cli.patch import calibrated, save
from hf_softheads.cli.values import positive, whole


def add(parser: argparse.ArgumentParser) -> None:
    models.add_model(parser)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--bits", type=positive, help="bits per weight of the dense head, everything included"
    )
    budget.add_argument("--bytes", type=positive, metavar="BYTES", help="total bytes of the head")
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        default="stdlib",
        help="text to fit and to judge on: a file, or 'stdlib'",
    )
    parser.add_argument(
        "--tokens", type=whole(1), default=131_072, help="maximum number of calibration tokens"
    )
    parser.add_argument(
        "--output", type=Path, help="patch the model with it and save it as safetensors"
    )


def run(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.files import check_output
    from hf_softheads.measure.choose import within_budget

    if arguments.output is not None:
        check_output(arguments.output)
    named = models.find(arguments.model)
    rows = texts.rows(arguments.calibrate, "train", named)
    model = named.load(arguments.dtype)
    if arguments.output is not None:
        check_output(arguments.output, models.nbytes(model))
    within_budget(model, bits=arguments.bits, nbytes=arguments.bytes)
    stats = calibrated(model, rows, arguments.tokens)
    choice = sh.choose(model, stats, bits=arguments.bits, nbytes=arguments.bytes)
    print(choice)
    print(f"best: {json.dumps(choice.spec.to_dict())}")
    if arguments.output is not None:
        print(sh.describe(sh.patch(model, head=choice.spec, stats=stats)))
        save(model, named, arguments.output)
