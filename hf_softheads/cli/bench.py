"""prefill and decode speed of a whole model with its own head and with others"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_softheads.cli import models, texts
from hf_softheads.cli.patch import calibrated
from hf_softheads.cli.values import counts, head, positive, whole


def add(parser: argparse.ArgumentParser) -> None:
    models.add_model(parser)
    parser.add_argument(
        "--head",
        type=head,
        action="append",
        default=[],
        metavar="SPEC",
        help="A head to measure beside the model's own, as NAME, NAME:FIELD=VALUE,… or JSON. Repeat it for more heads; "
        "by default only the model's own head is measured.",
    )
    parser.add_argument(
        "--batch",
        type=counts,
        default=[1, 4, 16],
        help="Rows decoded together, with commas between several batch sizes. The default is 1,4,16.",
    )
    parser.add_argument(
        "--prompt", type=whole(1), default=128, help="Prompt tokens per row. The default is 128."
    )
    parser.add_argument(
        "--steps", type=whole(1), default=8, help="Tokens written per round. The default is 8."
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=20.0,
        help="Seconds of measuring per batch size, at least three rounds. The default is 20.",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="Text for heads whose fit needs statistics: a file, or 'stdlib'. By default there are none.",
    )
    parser.add_argument(
        "--tokens",
        type=whole(1),
        default=16_384,
        help="Maximum number of calibration tokens. The default is 16384.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write the JSON to a file too.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.epilog = "example: softheads bench embedded --head quantized:bits=4 --batch 1"


def run(arguments: argparse.Namespace) -> None:
    from hf_softheads.files import check_output_file, write_json
    from hf_softheads.measure.bench import bench

    if arguments.output is not None:
        check_output_file(arguments.output)
    named = models.find(arguments.model)
    rows = texts.rows(arguments.calibrate, "train", named) if arguments.calibrate else None
    model = named.load(arguments.dtype)
    stats = None if rows is None else calibrated(model, rows, arguments.tokens)
    found = bench(
        model,
        {spec.short(): spec for spec in arguments.head},
        stats=stats,
        batches=arguments.batch,
        prompt=arguments.prompt,
        steps=arguments.steps,
        seconds=arguments.seconds,
    )
    print(found.to_json() if arguments.json else found)
    if arguments.output is not None:
        write_json(arguments.output, found.to_dict())
