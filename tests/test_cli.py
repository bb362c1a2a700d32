"""The `softheads` command, as a user types it."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_softheads import heads
from hf_softheads.cli import main
from hf_softheads.registry import spec_from_dict
from hf_softheads.text import embedded

TEXT = "def add(a, b):\n    return a + b\n\n" * 200


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "vq"
    command = ["patch", "embedded", "--head", "vq", "--set", "head.codes=64", "--output", str(out)]
    assert main(command) == 0
    return out


def fails(capsys, *command):
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"softheads {command[0]}: ")
    assert "\n" not in error
    return error


def test_embedded_model_reads_like_python():
    model, tokenizer = embedded.load_embedded()
    prompt = tokenizer("def __init__(self,", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    text = tokenizer.decode(written[0])
    assert "):" in text
    assert "self." in text
    assert sum(f.stat().st_size for f in embedded.FOLDER.iterdir()) <= 10_000_000


def test_list(capsys):
    assert main(["list", "head"]) == 0
    printed = capsys.readouterr().out
    assert "vq" in printed
    assert "codes" in printed
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "softpick" in printed
    assert "label_smoothing" in printed


def test_patch_writes_a_model_that_loads(exported):
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.get_output_embeddings().weight.shape == (64, 192)
    assert model(torch.tensor([[0, 5]])).logits.shape == (1, 2, 8192)
    assert (exported / "README.md").is_file()
    assert (exported / "tokenizer.json").is_file()


def test_patch_with_calibration_and_layers(text, tmp_path, capsys):
    out = tmp_path / "out"
    command = f"patch embedded --attention ssmax --layers 0,-1 --calibrate {text} --output {out}"
    options = ["--head", "vq", "--set", "head.codes=64", "--set", "head.bias=prior"]
    with pytest.warns(UserWarning, match=r"they need about 3,072: run sh.collect on more text"):
        assert main([*command.split(), *options]) == 0
    printed = capsys.readouterr().out
    assert "floor" in printed
    assert "model.layers.3.self_attn" in printed
    assert "model.layers.1.self_attn" not in printed


def test_choose_prints_its_table_and_saves_the_best(text, tmp_path, capsys, monkeypatch):
    few = {"vq": heads.VQ, "quantized": heads.Quantized}
    monkeypatch.setattr(import_module("hf_softheads.measure.choose"), "variants", lambda kind: few)
    out = tmp_path / "chosen"
    command = ["choose", "embedded", "--bits", "5", "--calibrate", str(text), "--output", str(out)]
    with pytest.warns(UserWarning, match=r"they need about (8,192|3,072)"):
        assert main(command) == 0
    printed = capsys.readouterr().out
    best = json.loads(printed.partition("best: ")[2].partition("\n")[0])
    table = printed.splitlines()
    assert str(spec_from_dict("head", best)) in table[1]
    losses = [float(line.split()[1]) for line in table[1:3]]
    assert losses == sorted(losses)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.quantization_config.head.to_dict() == best
    assert "is not empty" in fails(capsys, *command)


def test_eval(exported, text, capsys):
    assert (
        main(["eval", str(exported), "--data", str(text), "--reference", "embedded", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] > found["reference_perplexity"] > 1
    assert found["bits_per_byte"] > 0
    assert main(["eval", "embedded", "--data", str(text), "--window", "64", "--stride", "32"]) == 0
    assert "bits per byte" in capsys.readouterr().out


def test_card(exported, tmp_path, capsys):
    results = {"stages": [{"name": "dense", "perplexity": 2.0}, {"name": "vq", "perplexity": 3.0}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main(["card", str(exported), "--results", str(tmp_path / "results.json")]) == 0
    card = (exported / "README.md").read_text()
    assert "| vq | 3.00 | 1.500 |" in card
    assert "library_name: transformers" in card


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("patch embedded --head vqq --output out", "unknown head variant 'vqq'; did you mean 'vq'"),
        ("patch embedded --head vq --output out", "needs a value for 'codes'"),
        ("patch embedded --head vq --set head.code=3 --output out", "did you mean 'codes'"),
        ("patch embedded --head vq --set codes=3 --output out", "--set takes head.FIELD=VALUE"),
        ("patch embedded --head vq --set attention.k=3 --output out", "there is no --attention"),
        (
            "patch embedded --head vq --set head.codes=9999 --output out",
            "9999 codes for 8192 tokens",
        ),
        ("patch embedded --attention ssmax --layers 7 --output out", "the model has layers 0 to 3"),
        ("patch embedded --attention ssmax --layers a --output out", "a layer is an integer"),
        ("patch embedded --output out", "nothing to do"),
        ("patch no/such/folder --head dense --output out", "cannot load 'no/such/folder'"),
        ("choose embedded --bits 0.001 --tokens 9000", "no head fits into 0.001 bits"),
        ("eval embedded --data nothing.txt", "no such file or folder: nothing.txt"),
        ("card .", "no results to put on the card"),
    ],
)
def test_wrong_input_is_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *command.split())
    assert list(tmp_path.iterdir()) == []


def test_empty_and_short_text(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(" \n")
    assert "holds no text" in fails(capsys, "eval", "embedded", "--data", file)
    file.write_text("x = 1\n")
    assert "less than one window of 512" in fails(capsys, "eval", "embedded", "--data", file)


def test_a_model_without_its_tokenizer(text, tmp_path, capsys):
    model, _ = embedded.load_embedded()
    model.save_pretrained(tmp_path / "bare")
    error = fails(capsys, "eval", tmp_path / "bare", "--data", text)
    assert "holds a model but no tokenizer" in error
