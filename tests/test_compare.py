"""`compare` and `softheads compare`: numbers against the first model, one table, one page, one JSON file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch

import hf_softheads as sh
from hf_softheads.cli import main
from hf_softheads.measure.compare import Candidate, compare
from hf_softheads.report.page import page
from hf_softheads.report.tables import Table
from hf_softheads.text.windows import windows
from tests.conftest import VOCAB, make_model

ROWS = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))


def small_head():
    return sh.patch(make_model("llama"), head=sh.heads.Quantized(2))


def test_numbers_are_those_of_evaluate():
    candidates = [
        Candidate("dense", lambda: make_model("llama"), 100),
        Candidate("small", small_head, 50),
        Candidate("same", lambda: make_model("llama"), 100),
    ]
    found = compare(candidates, windows(ROWS), prompt=4, steps=1, rounds=2)
    dense, small, same = found.rows
    expected = sh.evaluate(small_head(), ROWS, reference=make_model("llama"))
    for name in ("perplexity", "ratio", "ratio_error", "kl", "top1"):
        assert getattr(small, name) == pytest.approx(getattr(expected, name))
    assert dense.ratio is None
    assert (same.ratio, same.ratio_error, same.top1) == (1, 0, 1)
    assert (dense.nbytes, dense.head_nbytes) == (100, VOCAB * 32 * 4)
    assert small.head_nbytes == small_head().lm_head.nbytes
    assert all(row.decode > 0 for row in found.rows)
    assert same.speedup > 0
    again = json.loads(found.to_json())
    assert again["settings"]["tokens"] == 45
    assert [row["name"] for row in again["rows"]] == ["dense", "small", "same"]
    assert "small" in str(found)


@pytest.mark.parametrize("names", [["one"], ["one", "one"]])
def test_two_models_of_different_names(names):
    candidates = [Candidate(name, lambda: pytest.fail("was loaded"), 0) for name in names]
    with pytest.raises(ValueError, match="two or more models of different names, got "):
        compare(candidates, windows(ROWS))


class Tags(HTMLParser):
    """The tags that are open, and what the page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.cells = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.cells += tag == "td"
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_stands_alone_and_shows_what_it_is_given():
    table = Table(["model", "perplexity"], [["<b>&", "2.0"], ["other", "3.0"]])
    rows = [{"name": "<b>&", "nbytes": 10, "perplexity": 2.0}] * 2
    text = page("Title", table, rows, {"text": "</pre>"})
    tags = Tags(text)
    assert tags.open == []
    assert tags.fetched == []
    assert tags.cells == 4
    assert "http" not in re.sub("<!doctype.*?>", "", text)
    assert "<b>" not in text
    assert text.count("<circle") == 2


def test_the_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n\n" * 60)
    packed = tmp_path / "packed"
    head = "--head quantized --dtype bfloat16"
    assert main([*f"patch embedded {head} --output {packed}".split()]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    command = ["compare", "embedded", str(packed), "--data", str(text), "--window", "64"]
    assert main([*command, "--tokens", "256", "--rounds", "1", "--output", str(out)]) == 0
    assert "packed" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "comparison.json"]
    dense, small = json.loads((out / "comparison.json").read_text())["rows"]
    assert small["nbytes"] < dense["nbytes"]
    assert small["head_nbytes"] < dense["head_nbytes"] / 3
    assert small["ratio"] == pytest.approx(1, abs=0.1)
    assert "packed" in (out / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare embedded", "the following arguments are required: other"),
        ("compare embedded embedded", "needs different models, got embedded embedded"),
        ("compare embedded file", "cannot load 'file': it is a file; give the folder"),
        ("compare embedded two", "cannot load 'two': it holds several GGUF files (a.gguf, b.gguf)"),
        ("compare embedded broken", "cannot load 'broken': "),
        ("compare embedded embedded --output file", "file is a file"),
        ("compare embedded embedded --tokens 1", "argument --tokens: needs at least 2, got 1"),
    ],
)
def test_wrong_input_is_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"\x00\xff\x00")
    for name in ("two/a.gguf", "two/b.gguf", "broken/a.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\xff\x00" * 99)
    before = sorted(tmp_path.rglob("*"))
    assert main(command.split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("softheads compare: ")
    assert message in error
    assert "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_another_vocabulary_is_refused_before_weights_are_read(tmp_path, capsys, monkeypatch):
    model, tokenizer = sh.embedded.load_embedded()
    model.resize_token_embeddings(8200)
    model.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    monkeypatch.setattr("hf_softheads.pretrained.NamedModel.load", lambda *_: pytest.fail("read"))
    assert main(["compare", "embedded", str(tmp_path / "larger")]) == 2
    assert "has another vocabulary than 'embedded' (8,200 and 8,192" in capsys.readouterr().err
