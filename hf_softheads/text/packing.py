"""Training text as rows of tokens: three ways to fill a row, in memory or streaming."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from hf_softheads.text.documents import encoded

Packing = Literal["documents", "stream", "pad"]
Row = dict[str, Tensor]


def rows(texts: Iterable[str], tokenizer: Any, window: int, packing: Packing) -> Iterator[Row]:
    """Rows of `window` tokens: `input_ids`, `labels` (-100 where nothing is to be predicted) and what keeps them apart.

    `documents` fills a row with documents, told apart by `position_ids` that start again (transformers then masks
    attention between them); `stream` lets attention cross from one document into the next; `pad` gives every piece of a
    document a row of its own with an `attention_mask`.
    """
    ids: list[int] = []
    starts: list[int] = []  # where documents begin in `ids`
    for document in encoded(texts, tokenizer):
        if packing == "pad":
            for i in range(0, len(document), window):
                if len(document) - i > 1:
                    yield _padded(document[i : i + window], window, tokenizer)
            continue
        starts.append(len(ids))
        ids += document
        begin = 0
        while len(ids) - begin >= window:
            here = [s - begin for s in starts if begin < s < begin + window]
            yield _packed(ids[begin : begin + window], here if packing == "documents" else None)
            begin += window
        ids, starts = ids[begin:], [s - begin for s in starts if s >= begin]


def _packed(ids: list[int], starts: list[int] | None) -> Row:
    row = torch.tensor(ids)
    if starts is None:
        return {"input_ids": row, "labels": row.clone()}
    position = torch.arange(len(ids))
    labels = row.clone()
    for start in starts:
        position[start:] = torch.arange(len(ids) - start)
        labels[start] = -100  # the document before says nothing about it
    return {"input_ids": row, "labels": labels, "position_ids": position}


def _padded(ids: list[int], window: int, tokenizer: Any) -> Row:
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    missing = window - len(ids)
    return {
        "input_ids": torch.tensor(ids + [fill] * missing),
        "labels": torch.tensor(ids + [-100] * missing),
        "attention_mask": torch.tensor([1] * len(ids) + [0] * missing),
    }


def stacked(some: Iterable[Row]) -> Row:
    """Rows under each other, `(N, window)` each.

    Raises:
        ValueError: there are none, or none has a token to predict.
    """
    listed = list(some)
    if not listed:
        raise ValueError("the text is shorter than one window; give more text or a smaller window")
    table = {k: torch.stack([row[k] for row in listed]) for k in listed[0]}
    if not (table["labels"][:, 1:] != -100).any():
        raise ValueError("every label is masked: there is no token to learn from")
    return table


class Batches:
    """One process' rows of every step: the same for any number of processes, and after a restart.

    Args:
        make: gives the rows from their beginning, every time it is called.
        batch: rows of a step over all processes, of which this process takes `count` from `first`.
        seed: of the order within every epoch. None for a stream, which is read in its own order, forward only.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Row]],
        *,
        batch: int,
        first: int,
        count: int,
        seed: int | None,
    ):
        self.make, self.batch, self.seed = make, batch, seed
        self.mine = slice(first, first + count)
        self._table: Row = {} if seed is None else stacked(make())
        self._order: tuple[int, Tensor] | None = None
        self._stream = itertools.chain.from_iterable(make() for _ in itertools.count())
        self._read = 0

    def at(self, step: int) -> Row:
        """The rows of one step, `(count, window)` each."""
        if self.seed is None:
            skipped = step * self.batch - self._read
            wanted = list(itertools.islice(self._stream, skipped, skipped + self.batch))
            self._read = (step + 1) * self.batch
            return {k: torch.stack([row[k] for row in wanted[self.mine]]) for k in wanted[0]}
        places = range(step * self.batch, (step + 1) * self.batch)[self.mine]
        index = [self._shuffled(place) for place in places]
        return {k: v[index] for k, v in self._table.items()}

    def _shuffled(self, place: int) -> int:
        count = len(self._table["input_ids"])
        epoch, at = divmod(place, count)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed or 0) + epoch)
            self._order = epoch, torch.randperm(count, generator=generator)
        return int(self._order[1][at])
