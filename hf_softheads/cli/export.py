"""write a model in a format that other software loads"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_softheads.cli import models, texts
from hf_softheads.cli.patch import calibrated
from hf_softheads.cli.values import positive, whole


def add(parser: argparse.ArgumentParser) -> None:
    from hf_softheads.exporting import FORMATS

    models.add_model(parser)
    parser.add_argument(
        "output", type=Path, help="The folder to write, which must be new or empty."
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="transformers",
        help="What to write. 'transformers', the default, is a folder for this package; 'compressed-tensors' is a "
        "packed checkpoint of a quantized head that transformers loads without it; 'gguf' is a file for llama.cpp.",
    )
    parser.add_argument(
        "--bits",
        type=positive,
        help="Bits per weight of the head of a GGUF file, everything included. The type that loses least within them "
        "is taken. The default is 4.5.",
    )
    parser.add_argument(
        "--head",
        metavar="TYPE",
        help="Type of the head of a GGUF file, such as Q4_0 or Q8_0. By default --bits decides.",
    )
    parser.add_argument(
        "--body",
        metavar="TYPE",
        help="Type of all other matrices of a GGUF file: f16, bf16, f32 or q8_0. The default is f16.",
    )
    parser.add_argument(
        "--calibrate",
        metavar="DATA",
        help="Text that the head of a GGUF file is fitted on: a file, or 'stdlib'. By default its rows are rounded to "
        "the nearest numbers.",
    )
    parser.add_argument(
        "--tokens",
        type=whole(1),
        default=131_072,
        help="Maximum number of calibration tokens. The default is 131072.",
    )
    parser.epilog = (
        "example: softheads export embedded out --format gguf --bits 4.5 --calibrate stdlib"
    )


def run(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.exporting import check_options
    from hf_softheads.files import check_output

    given = {name: getattr(arguments, name) for name in ("bits", "head", "body")}
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    fitted = {"stats": None} if arguments.calibrate else {}
    check_options(arguments.format, {**options, **fitted})
    check_output(arguments.output)
    named = models.find(arguments.model)
    rows = texts.rows(arguments.calibrate, "train", named) if arguments.calibrate else None
    model = named.load(arguments.dtype)
    if rows is not None:
        options["stats"] = calibrated(model, rows, arguments.tokens)
    saved = sh.export(model, arguments.output, named.tokenizer, format=arguments.format, **options)
    print(f"saved to {saved}")
