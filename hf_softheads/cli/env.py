"""versions, processor, kernels and GPU: what a report of a fault needs"""

from __future__ import annotations

import argparse
import json


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    from hf_softheads.report.environment import environment, environment_table

    found = environment()
    print(json.dumps(found, indent=1) if arguments.json else environment_table(found))
