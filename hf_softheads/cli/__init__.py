"""The `softheads` command. One file per command: its docstring is its help, `add` its options, `run` what it does."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import hf_softheads

COMMANDS = ("demo", "list", "patch", "choose", "eval", "diagnose", "card", "env")
_SIGPIPE = 128 + 13  # what a shell reports of a program whose reader went away
_LONGEST = 1000  # characters of a reason


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run: 0 when it worked; 2, and one line of reason, when it could not be done; 128 + its number after a
    signal."""
    try:
        try:
            with _one_line_warnings(), _terminable():
                return _run(argv)
        finally:
            sys.stdout.flush()  # here, where an error can be caught, and not when the interpreter ends
    except BrokenPipeError:  # `softheads list | head`
        _forget_stdout()
        return _SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    name = "softheads"
    try:
        arguments = _parser().parse_args(argv)
        name = f"softheads {arguments.command}"
        from hf_softheads.report.provenance import quiet_unless_terminal

        quiet_unless_terminal()
        arguments.run(arguments)
    except _Usage as error:
        return _refuse(str(error))
    except _Terminated:
        print(f"\n{name}: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        reason = f"{package} is not installed; run `pip install {package}`"
        return _refuse(f"{name}: {error if 'pip install' in str(error) else reason}")
    except (
        ValueError,
        TypeError,
        OSError,
        RuntimeError,
        NotImplementedError,
        ImportError,
    ) as error:
        return _refuse(f"{name}: {str(error).strip() or type(error).__name__}")
    return 0


def _refuse(reason: str) -> int:
    line = " ".join(reason.split())
    print(line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …", file=sys.stderr)
    return 2


class _Usage(Exception):
    """What argparse refuses, with the command's name."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Usage(f"{self.prog}: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softheads",
        description="Retrofit a pretrained model with another output head or attention softmax.",
    )
    version = f"softheads {hf_softheads.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command: Any = importlib.import_module(f"{__name__}.{name}")
        child = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        command.add(child)
        child.set_defaults(run=command.run)
    return parser


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends the command as Ctrl-C does, so that what is half-written is removed."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def terminate(*_: Any) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Warnings without the line of source that they come from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"softheads: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _forget_stdout() -> None:
    """Nobody reads it any more; without this the interpreter would complain once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
