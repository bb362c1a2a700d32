"""Writing files and folders whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHARD = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors")
_ROOM = 1.02  # times the bytes of the tensors: headers, the tokenizer, the card


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
    check_output(folder)
    folder = folder.resolve()
    fresh = _writing(folder)
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


def remove_other_shards(folder: Path, written: set[str]) -> None:
    """Shards of an earlier save of the same weights, which a loader might take for these: as transformers does."""
    weights = {found[1] for name in written if (found := _SHARD.fullmatch(name))}
    for path in folder.iterdir():
        found = _SHARD.fullmatch(path.name)
        if found and found[2] and found[1] in weights and path.name not in written:
            path.unlink()


def check_output(folder: Path, nbytes: float = 0, *, filled: bool = False) -> None:
    """Ask before long work whether its results can be written to `folder`, which need not exist; nothing is made.

    Args:
        nbytes: an estimate of what will be written.
        filled: the folder may hold files already.

    Raises:
        FileExistsError: it is no folder, or it holds files.
        OSError: it cannot be made or written to, or has too little room.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another name for the folder")
    if not filled and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} exists and is not empty; choose another folder or remove it"
        )
    if (fresh := _writing(folder)).exists():
        raise FileExistsError(
            f"{fresh} is in the way: another export is running, or was killed; remove it"
        )
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {place} is a file, not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {folder}: no permission to write in {place}")
    free = shutil.disk_usage(place).free
    if free < nbytes * _ROOM:
        raise OSError(f"{folder} needs {human_bytes(nbytes)}, only {human_bytes(free)} are free")


def _writing(folder: Path) -> Path:
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.writing")


def human_bytes(count: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON; names the file and the place in it.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is not JSON ({where}: {error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON (byte {error.start} is not UTF-8)") from error


def write_json(path: str | Path, data: Any) -> Path:
    """Write JSON by `replacing`: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path
