"""Rows of tokens: nothing lost, nothing mixed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_softheads.text.documents import read as documents
from hf_softheads.text.packing import Batches, rows, stacked


class Letters:
    """One token a letter; 0 begins a document."""

    bos_token_id, pad_token_id = 0, 9

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}


TEXTS = ["abc", "de", "abcdefgh", "a"]


def test_documents_are_packed_and_told_apart() -> None:
    found = list(rows(TEXTS, Letters(), 6, "documents"))
    assert [row["input_ids"].tolist() for row in found] == [
        [0, 1, 2, 3, 0, 4],
        [5, 0, 1, 2, 3, 4],
        [5, 6, 7, 8, 0, 1],
    ]
    assert [row["position_ids"].tolist() for row in found] == [
        [0, 1, 2, 3, 0, 1],
        [0, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 0, 1],
    ]
    assert [row["labels"].tolist() for row in found] == [
        [0, 1, 2, 3, -100, 4],
        [5, -100, 1, 2, 3, 4],
        [5, 6, 7, 8, -100, 1],
    ]


def test_a_stream_has_no_borders() -> None:
    found = list(rows(TEXTS, Letters(), 6, "stream"))
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in found)
    assert all("position_ids" not in row for row in found)


def test_padding_gives_every_piece_a_row() -> None:
    found = list(rows(TEXTS, Letters(), 6, "pad"))
    assert [row["input_ids"].tolist() for row in found] == [
        [0, 1, 2, 3, 9, 9],
        [0, 4, 5, 9, 9, 9],
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 9, 9],
        [0, 1, 9, 9, 9, 9],
    ]
    for row in found:
        assert ((row["labels"] == -100) == (row["attention_mask"] == 0)).all()


def test_packed_documents_do_not_see_each_other(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = ["def class return", "import self value None True"]
    ids = [[0, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    (row,) = rows(texts, tokenizer, len(ids[0]) + len(ids[1]), "documents")
    with torch.no_grad():
        packed = model(
            row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False
        ).logits[0]
        alone = torch.cat([model(torch.tensor([i])).logits[0] for i in ids])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, None])
def test_processes_share_the_batches_of_one(seed: int | None) -> None:
    def make() -> Any:
        return rows(["abcdefghijklmnopqrstuvwxyz" * 4], Letters(), 5, "stream")

    count = len(list(make()))
    one = Batches(make, batch=4, first=0, count=4, seed=seed)
    two = [Batches(make, batch=4, first=i, count=2, seed=seed) for i in (0, 2)]
    late = Batches(make, batch=4, first=0, count=4, seed=seed)
    seen = []
    for step in range(12):
        whole = one.at(step)["input_ids"]
        assert torch.equal(torch.cat([b.at(step)["input_ids"] for b in two]), whole)
        seen += whole.tolist()
    assert torch.equal(late.at(11)["input_ids"], whole)  # as after a restart
    epoch = sorted(seen[:count])
    assert epoch == sorted(row["input_ids"].tolist() for row in make())
    assert 2 * count < 12 * 4  # it went around


def test_sources(folder: Path, tmp_path: Path) -> None:
    lines = list(documents(str(folder / "train.jsonl"), "", "text"))
    assert len(lines) == 30
    streamed = documents(str(folder / "train.jsonl"), "", "text", streaming=True)
    assert list(itertools.islice(streamed, 3)) == lines[:3]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": lines}), tmp_path / "t.parquet")
    assert list(documents(str(tmp_path / "t.parquet"), "", "body")) == lines
    for i, line in enumerate(lines[:3]):
        (tmp_path / f"{i}.txt").write_text(line)
    assert list(documents(str(tmp_path), "", "text")) == lines[:3]
    assert "import" in "".join(documents("stdlib", "heldout", "text"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_id(streaming: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`owner/name:configuration` is asked for as such; what comes back is read in order."""
    asked: list[Any] = []
    load = datasets.load_dataset

    def from_here(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        file = str(folder / "train.jsonl")
        return load("json", data_files=file, split="train", streaming=options["streaming"])

    monkeypatch.setattr(datasets, "load_dataset", from_here)
    found = list(documents("owner/name:small", "validation", "text", streaming=streaming))
    assert asked == [(("owner/name", "small"), {"split": "validation", "streaming": streaming})]
    assert found == list(documents(str(folder / "train.jsonl"), "", "text"))


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter than one window"):
        stacked(rows(["abc"], Letters(), 64, "stream"))
    masked = {"input_ids": torch.ones(4), "labels": torch.full((4,), -100)}
    with pytest.raises(ValueError, match="every label is masked"):
        stacked([masked])
