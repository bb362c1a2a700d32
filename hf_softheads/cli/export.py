"""write a model in a format that other software loads"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_softheads.cli import models


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
        "packed checkpoint of a quantized head that transformers loads without it.",
    )
    parser.epilog = (
        "example: softheads patch embedded --head quantized --set head.levels=integers --output packed, then softheads "
        "export packed plain --format compressed-tensors"
    )


def run(arguments: argparse.Namespace) -> None:
    import hf_softheads as sh
    from hf_softheads.files import check_output

    check_output(arguments.output)
    named = models.find(arguments.model)
    model = named.load(arguments.dtype)
    saved = sh.export(model, arguments.output, named.tokenizer, format=arguments.format)
    print(f"saved to {saved}")
