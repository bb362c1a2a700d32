"""the whole way on the embedded model, about two minutes"""

from __future__ import annotations

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument(
        "--quick", action="store_true", help="half a minute: a check, not a measurement"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    from hf_softheads import demo

    demo.run(arguments.output, quick=arguments.quick, seed=arguments.seed)
