"""Reading the command line and running one command, whose errors and signals become one line."""

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

from hf_softheads.version import __version__

COMMANDS = (
    *("demo", "list", "patch", "choose", "eval", "compare", "bench", "diagnose"),
    *("export", "card", "push", "env"),
)
_SIGPIPE = 128 + 13  # what a shell reports of a program whose reader went away
_LONGEST = 1000  # characters of a reason


def run(argv: Sequence[str] | None) -> int:
    """As `hf_softheads.cli.main`."""
    try:
        try:
            with _one_line_warnings(), _terminable():
                return _answer(argv)
        finally:
            sys.stdout.flush()  # here, where an error can be caught, and not when the interpreter ends
    except BrokenPipeError:  # `softheads list | head`
        _forget_stdout()
        return _SIGPIPE


def _answer(argv: Sequence[str] | None) -> int:
    name = "softheads"
    try:
        arguments = _parser().parse_args(argv)
        name = f"softheads {arguments.command}"
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


class _Command(_Parser):
    """Gets its options when it is chosen: some name the variants, which need torch."""

    def __init__(self, *, module: Any, **kwargs: Any):
        super().__init__(description=module.__doc__, **kwargs)
        self._add = module.add
        self.set_defaults(run=module.run)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        self._add(self)
        return super().parse_known_args(*args, **kwargs)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="softheads",
        description="Retrofit a pretrained model with another output head or attention softmax.",
    )
    parser.add_argument("--version", action="version", version=f"softheads {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Command)
    for name in COMMANDS:
        module = importlib.import_module(f"hf_softheads.cli.{name}")
        commands.add_parser(name, help=module.__doc__, module=module)
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
