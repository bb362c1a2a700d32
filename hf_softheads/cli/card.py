"""write the model card of an exported folder"""

from __future__ import annotations

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--results", type=Path, help="a results file; default the one in the folder"
    )


def run(arguments: argparse.Namespace) -> None:
    from hf_softheads.files import read_json
    from hf_softheads.report import cards

    source = arguments.results or arguments.folder / cards.RESULTS
    if not source.is_file():
        raise FileNotFoundError(f"no results to put on the card: {source}; give --results FILE")
    try:
        print(cards.write_card(arguments.folder, read_json(source)))
    except cards.BadResults as error:
        raise ValueError(f"{source}: {error}") from error
