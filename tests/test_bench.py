"""`bench` and `softheads bench`: what is timed, what is counted, and what is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest
import torch

import hf_softheads as sh
from hf_softheads.cli import main
from hf_softheads.measure.bench import bench
from hf_softheads.measure.step_times import StepClock
from tests.conftest import VOCAB, make_model

SHORT = {"batches": (1, 3), "prompt": 6, "steps": 2, "seconds": 1e-6}


def test_head_and_body_are_told_apart_within_a_step(monkeypatch):
    """A clock that only the layers and the head move: one second a layer, three for the head."""
    model, clock = make_model("llama"), [0.0]
    dense = model.lm_head.forward

    def slow(hidden):
        clock[0] += 3
        return dense(hidden)

    def tick(*_):
        clock[0] += 1

    model.lm_head.forward = slow
    for layer in model.model.layers:
        layer.register_forward_hook(tick)
    monkeypatch.setattr(StepClock, "now", lambda _: clock[0])
    (row,) = bench(model, batches=[2], prompt=5, steps=3, seconds=1e-6).rows
    assert (row.body_ms, row.head_ms) == (2000, 3000)
    assert (row.prefill, row.decode) == (2 * 5 / 5, 2 / 5)
    assert (row.speedup, row.limit) == (1, 5 / 2)


def test_a_tied_model_is_measured_with_each_head_and_put_back(tokens):
    model = make_model("llama", tie_word_embeddings=True)
    before, kind = model(tokens).logits, type(model)
    found = bench(model, {"four": sh.heads.Quantized(4), "eight": sh.heads.Quantized(8)}, **SHORT)
    assert type(model) is kind
    assert torch.equal(model(tokens).logits, before)
    assert not model.lm_head._forward_hooks
    assert [(row.head, row.batch) for row in found.rows] == [
        (head, batch) for batch in SHORT["batches"] for head in ("dense", "four", "eight")
    ]
    dense, four, eight = found.rows[:3]
    assert dense.speedup == 1
    assert four.limit == dense.limit > 1
    assert all(row.prefill > 0 and row.decode > 0 and row.head_ms > 0 for row in found.rows)
    table = VOCAB * 32 * 4
    assert dense.bytes_read - eight.bytes_read == table - (VOCAB * 32 + VOCAB * 4)
    assert eight.bytes_read - four.bytes_read == VOCAB * 16
    layers = 4 * sum(t.numel() for t in (*model.parameters(), *model.buffers())) - table
    assert dense.bytes_read == layers + table + 32 * 4  # the tied table once, and one row of it
    again = json.loads(found.to_json())
    assert again["rows"][1]["head"] == "four"
    assert again["settings"]["heads"]["four"]["bits"] == 4
    assert again["provenance"]["versions"]["torch"] == torch.__version__
    assert "four" in str(found)


def test_a_patched_model_is_compared_with_a_dense_head(tokens):
    model = sh.patch(make_model("gemma3_text"), head=sh.heads.Quantized(4))
    before = model(tokens).logits
    rows = bench(model, **SHORT).rows
    assert [row.head for row in rows] == ["dense", "quantized()"] * 2
    assert rows[0].bytes_read > rows[1].bytes_read
    assert torch.equal(model(tokens).logits, before)


def test_a_head_that_cannot_be_fitted_leaves_the_model_as_it_was(tokens):
    model = make_model("llama")
    before = model(tokens).logits
    heads = {"four": sh.heads.Quantized(4), "few": sh.heads.Quantized(4, frequent=8)}
    with pytest.raises(ValueError, match="needs the token frequencies"):
        bench(model, heads, **SHORT)
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": 0}, "at least 1 as prompt, got 0"),
        ({"steps": 0}, "at least 1 as steps, got 0"),
        ({"batches": [4, 0]}, "at least 1 as batch 0, got 0"),
        ({"batches": []}, "at least one batch size"),
        ({"seconds": 0}, "positive number of seconds, got 0"),
        ({"prompt": 60, "steps": 8}, "60 tokens and 8 after it are more than this model's 64"),
        (
            {"prompt": 8, "heads": {"dense": sh.heads.Quantized(4)}},
            "'dense' is the name of the model's own",
        ),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        bench(make_model("llama"), **settings)


def test_heads_for_a_patched_model_are_refused():
    model = sh.patch(make_model("llama"), head=sh.heads.Quantized(4))
    with pytest.raises(ValueError, match=r"already patched with Quantized.*the original model"):
        bench(model, {"eight": sh.heads.Quantized(8)}, **SHORT)


def test_the_command(capsys, tmp_path):
    file = tmp_path / "new" / "bench.json"
    command = "bench embedded --head quantized:bits=8 --batch 1 --prompt 4 --steps 1"
    assert main([*command.split(), "--seconds", "0.01", "--output", str(file)]) == 0
    assert "quantized(bits=8)" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["head"] for row in rows] == ["dense", "quantized(bits=8)"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--head vqq", "argument --head: unknown head variant 'vqq'; did you mean 'vq'"),
        ("--head quantized:bits=7", "quantized.bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ("--head quantized:bits", "needs NAME:FIELD=VALUE,… or JSON, got 'quantized:bits'"),
        ("--head [4]", "a head variant is a dictionary with a 'name', got [4]"),
        ("--batch 1,x", "argument --batch: needs a whole number, got 'x'"),
        ("--batch 0", "argument --batch: needs at least 1, got 0"),
        ("--seconds 0", "needs a finite number above 0"),
        ("--prompt 600", "more than this model's 512 positions"),
        ("--output .", ". is a folder; choose another name for the file"),
    ],
)
def test_wrong_input_is_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "embedded", *options.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("softheads bench: ")
    assert message in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []
