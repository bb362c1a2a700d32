"""Every source of text as documents: names and files (`read`), and Python objects (`documents`)."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_softheads.text.stdlib_corpus import stdlib_documents

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read(
    source: str, split: str = "train", column: str = "text", *, streaming: bool = False
) -> Iterable[str]:
    """Texts of a source, one after the other.

    Args:
        source: `stdlib` (the running interpreter's standard library), a file (`.txt` and other text; `.jsonl`, `.json`,
            `.parquet`, `.csv`), a folder of text files, or a `datasets` id, `owner/name` or `owner/name:configuration`.
        split: of a `datasets` id; for `stdlib` `train` or `heldout`; files have none.
        column: the column that holds the text.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no such column, or no text at all.
    """
    path = Path(source)
    if source == "stdlib":
        if split not in ("train", "heldout"):
            raise ValueError(f"stdlib has the splits train and heldout, not {split!r}")
        return stdlib_documents("train" if split == "train" else "heldout")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".py"))
        return _some(map(_text_of, files), source)
    if path.is_file() and path.suffix not in _READERS:
        return _some([_text_of(path)], source)
    import datasets

    if path.is_file():
        try:
            with _quiet_datasets():
                table = datasets.load_dataset(
                    _READERS[path.suffix], data_files=source, split="train", streaming=streaming
                )
        except (datasets.exceptions.DatasetsError, ValueError) as error:
            told = error.__cause__ or error  # datasets' own message names only its cache
            reason = (str(told).strip() or type(told).__name__).splitlines()[0]
            raise ValueError(f"{source} cannot be read as {path.suffix}: {reason}") from error
    elif path.suffix or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such file or folder: {source}")
    else:
        name, _, configuration = source.partition(":")
        table = datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
    columns = table.column_names or list(next(iter(table)))
    if column not in columns:
        raise ValueError(
            f"{source} has no text column {column!r}, its columns are {', '.join(columns)}; rename one of them, "
            "or in a recipe set text_column"
        )
    return _some((example[column] for example in table), source)


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without its log, which tells an error once more, and without progress bars in logs and pipes."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("datasets")
    level, bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is {path.read_bytes()[error.start]:#04x}); give a text file"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds zero bytes; give a text file")
    return text


def _some(texts: Iterable[str], source: str) -> Iterator[str]:
    iterator = (text for text in texts if text and text.strip())
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"{source} holds no text")

    def chained() -> Iterator[str]:
        yield first
        yield from iterator

    return chained()


def documents(data: Any) -> list[str]:
    """The texts of a path, a string, a list of strings, or a `datasets` object with a `text` column.

    Raises:
        ValueError: nothing but white space, or no `text` column.
        FileNotFoundError: a path that does not exist.
    """
    texts: Sequence[str]
    if isinstance(data, os.PathLike):
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"no such text file: {path}")
        texts = [_text_of(path)]
        data = path
    elif isinstance(data, str):
        texts = [data]
    elif hasattr(data, "column_names"):
        if "text" not in (data.column_names or []):
            raise ValueError(f"the dataset has no 'text' column, only {data.column_names}")
        texts = list(data["text"])
    elif isinstance(data, Iterable):
        texts = list(data)
    else:
        raise ValueError(
            "expected text, a path, a datasets object, a token tensor or a dictionary with input_ids, got "
            f"{type(data).__name__}"
        )
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"expected text, got {type(next(t for t in texts if not isinstance(t, str))).__name__}"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("the text is empty" + (f": {data}" if isinstance(data, Path) else ""))
    return list(texts)


def encoded(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document, begun by the tokenizer's BOS token where it has one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    waiting: list[str] = []
    for text in texts:
        waiting.append(text)
        if len(waiting) == 64:
            yield from (
                begin + ids for ids in tokenizer(waiting, add_special_tokens=False)["input_ids"]
            )
            waiting = []
    if waiting:
        yield from (
            begin + ids for ids in tokenizer(waiting, add_special_tokens=False)["input_ids"]
        )
