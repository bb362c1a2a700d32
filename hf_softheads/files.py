"""Writing files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to it when all went well, else removed."""
    path = Path(path)
    fresh = path.with_name(f"{path.stem}.writing{path.suffix}")
    try:
        yield fresh
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which must be new or empty; renamed to it when all went well, else removed.

    Raises:
        FileExistsError: `folder` exists and is not empty, or another process is writing it.
        OSError: the place is not writable.
    """
    refuse_existing(folder)
    fresh = folder.with_name(folder.name + ".writing")
    if fresh.exists():
        raise FileExistsError(
            f"{fresh} is in the way: another export is running, or was killed; remove it"
        )
    try:
        fresh.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder.parent}: {error.strerror or error}") from error
    try:
        yield fresh
        if folder.exists():
            folder.rmdir()
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`; its files move into `folder` if all went well, else are removed.

    Files that were there stay, but for those of the same name, which are replaced one by one at the end.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield fresh
        for path in sorted(fresh.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if new and not any(folder.iterdir()):
            folder.rmdir()


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError if `folder` holds anything; for long work to ask before it starts."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists and is not empty; choose another folder or remove it"
        )


def write_json(path: str | Path, data: Any) -> Path:
    """Write JSON by `replacing`: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path
