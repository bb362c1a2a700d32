"""The `softheads` command. One file per command: its docstring is its help, `add` its options, `run` what it does."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run: 0 when it worked; 2, and one line of reason, when it could not be done; 128 + its number after a
    signal, which may come while everything else is still being imported."""
    try:
        from hf_softheads.cli.command import run

        return run(argv)
    except KeyboardInterrupt:
        print("\nsoftheads: interrupted", file=sys.stderr)
        return 130
