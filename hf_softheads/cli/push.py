"""upload an exported folder to the Hugging Face Hub"""

from __future__ import annotations

import argparse
from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="A folder that `softheads export` or `patch` wrote."
    )
    parser.add_argument("repo", help="The repository as OWNER/NAME. It is made if it is not there.")
    parser.add_argument(
        "--private",
        action="store_true",
        help="Make a new repository private. By default everybody can read it.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Show every file and the card and upload nothing. It needs neither a token nor a connection.",
    )
    parser.epilog = "example: softheads push out me/my-model --dry-run"


def run(arguments: argparse.Namespace) -> None:
    from hf_softheads.exporting import hub

    if arguments.dry_run:
        print(hub.prepare_upload(arguments.folder, arguments.repo))
        return
    print(hub.push(arguments.folder, arguments.repo, private=arguments.private))
