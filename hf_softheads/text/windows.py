"""Whatever a user has, as token windows: text, files, `datasets` objects, token tensors, ready-made batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_softheads.text.documents import documents, encoded


@dataclass(frozen=True)
class Windows:
    """Token windows `(N, W)` and which of their tokens count: `labels (N, W)` is `-100` where none is asked for.

    `labels[n, t]` is the token at position t itself; a causal model predicts it from position `t − 1`.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    n_bytes: int | None = None

    def head(self, tokens: int) -> Windows:
        """The first windows, about `tokens` tokens of them and at least one window."""
        count = max(1, tokens // self.input_ids.shape[1])
        n_bytes = self.n_bytes and round(self.n_bytes * min(1.0, count / len(self.input_ids)))
        return Windows(
            self.input_ids[:count], self.labels[:count], self.attention_mask[:count], n_bytes
        )

    def shuffled(self, seed: int) -> Windows:
        order = torch.randperm(len(self.input_ids), generator=torch.Generator().manual_seed(seed))
        return Windows(
            self.input_ids[order], self.labels[order], self.attention_mask[order], self.n_bytes
        )

    def batches(self, size: int) -> Iterable[dict[str, Tensor]]:
        parts = (
            self.input_ids.split(size),
            self.labels.split(size),
            self.attention_mask.split(size),
        )
        for ids, labels, mask in zip(*parts, strict=True):
            yield {"input_ids": ids, "labels": labels, "attention_mask": mask}


def windows(
    data: Any, tokenizer: Any = None, *, window: int = 1024, stride: int | None = None
) -> Windows:
    """Cut data into windows. No token is counted twice, each with at least `window − stride` tokens before it; the
    first token of a window without overlap has no context and is not counted.

    Args:
        data: a path of a text file; a string or list of strings (documents); a `datasets` object with a `text` or
            `input_ids` column; a token tensor `(T,)`, or `(N, W)` whose rows are windows already; a dictionary with
            `input_ids` (and `attention_mask`, `labels`), or a list of such.
        tokenizer: needed for text.
        window: tokens a window, at most what the model was trained for.
        stride: how far the window moves; default `window`, no overlap.

    Raises:
        ValueError: no text, text without a tokenizer, fewer tokens than one window, a bad window or stride, a
            dictionary without `input_ids`, tokens that are no whole numbers.
        FileNotFoundError: a path that does not exist.
    """
    stride = window if stride is None else stride
    if window < 2 or not 0 < stride <= window:
        raise ValueError(
            f"need window ≥ 2 and 0 < stride ≤ window, got window={window}, stride={stride}"
        )
    if isinstance(data, Windows):
        return data
    if isinstance(data, Mapping):
        return _from_batches([data])
    if isinstance(data, list) and data and isinstance(data[0], Mapping):
        return _from_batches(data)
    if isinstance(data, list) and data and isinstance(data[0], Tensor):
        data = torch.cat([row.reshape(-1, row.shape[-1]) for row in data])
    if isinstance(data, Tensor):
        data = _ids(data)
    if isinstance(data, Tensor) and data.ndim == 2:
        return Windows(data, _all_but_first(data), torch.ones_like(data))
    stream, n_bytes = _stream(data, tokenizer)
    return _slide(stream, n_bytes, window, stride)


def _stream(data: Any, tokenizer: Any) -> tuple[Tensor, int | None]:
    if isinstance(data, Tensor):
        return data, None
    columns = getattr(data, "column_names", None) or []
    if "input_ids" in columns:
        return torch.cat([torch.as_tensor(row) for row in data["input_ids"]]), None
    texts = documents(data)
    if tokenizer is None:
        raise ValueError(
            "text needs tokenizer=…, e.g. AutoTokenizer.from_pretrained(the model's id)"
        )
    stream = torch.tensor([i for ids in encoded(texts, tokenizer) for i in ids], dtype=torch.long)
    return stream, sum(len(text.encode()) for text in texts)


def _slide(stream: Tensor, n_bytes: int | None, window: int, stride: int) -> Windows:
    if len(stream) < window:
        raise ValueError(
            f"the text has {len(stream)} tokens, less than one window of {window}; give at least "
            f"{window - len(stream)} more, or a smaller window"
        )
    starts = list(range(0, len(stream) - window + 1, stride))
    if starts[-1] + window < len(stream):
        starts.append(len(stream) - window)  # the rest, in a window that overlaps more
    rows = torch.stack([stream[start : start + window] for start in starts])
    labels = rows.clone()
    end = 1  # the stream's first token has no context
    for label, start in zip(labels, starts, strict=True):
        label[: max(end - start, 1)] = -100
        end = start + window
    counted = int((labels != -100).sum())
    share = None if n_bytes is None else round(n_bytes * counted / (len(stream) - 1))
    return Windows(rows, labels, torch.ones_like(rows), share)


def _from_batches(batches: Sequence[Mapping[str, Any]]) -> Windows:
    batches = [_batch(batch) for batch in batches]
    width = max(batch["input_ids"].shape[-1] for batch in batches)
    parts: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for batch in batches:
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch.get("labels")
        if labels is None:
            before = torch.nn.functional.pad(mask, (1, 0))[
                :, :-1
            ]  # a padded token predicts nothing
            labels = ids.masked_fill((mask == 0) | (before == 0), -100)
        pad = (0, width - ids.shape[-1])
        for name, tensor, fill in (
            ("input_ids", ids, 0),
            ("labels", labels, -100),
            ("attention_mask", mask, 0),
        ):
            parts[name].append(torch.nn.functional.pad(tensor, pad, value=fill))
    joined = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return Windows(joined["input_ids"], joined["labels"], joined["attention_mask"])


def _batch(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch's tensors `(B, T)`, with a mask."""
    if batch.get("input_ids") is None:
        raise ValueError(f"a batch is a dictionary with input_ids, got the keys {list(batch)}")
    ids = _ids(batch["input_ids"])
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("attention_mask", "labels"):
        if batch.get(name) is not None:
            found[name] = torch.as_tensor(batch[name])
    if ids.ndim != 2 or any(tensor.shape != ids.shape for tensor in found.values()):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in found.items())
        raise ValueError(
            f"a batch holds input_ids (B, T) and others of the same shape, got {shapes}"
        )
    return found


def _ids(data: Any) -> Tensor:
    """Token ids as a tensor `(T,)` or `(N, W)`."""
    try:
        ids = torch.as_tensor(data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"token ids are a tensor of whole numbers, got {type(data).__name__} ({error})"
        ) from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"token ids are whole numbers, got a tensor of {ids.dtype}")
    if ids.ndim not in (1, 2) or not ids.numel():
        raise ValueError(f"token ids are a tensor (T,) or (N, W), got {tuple(ids.shape)}")
    return ids.long()


def _all_but_first(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, 0] = -100
    return labels
