"""The `softheads` command, as a user types it."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

import hf_softheads
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
    few = [[heads.LowRank(8), heads.LowRank(16)], [heads.Dense()]]
    monkeypatch.setattr("hf_softheads.measure.choose._ladders", lambda *_: few)
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
        ("eval embedded --data nothing.txt", "no such file or folder: nothing.txt"),
        ("card .", "no results to put on the card"),
        ("diagnose embedded --rows 0", "argument --rows: needs at least 1, got 0"),
        ("diagnose embedded --window 1", "argument --window: needs at least 2, got 1"),
        ("diagnose embedded --epsilon nan", "argument --epsilon: needs a finite number"),
        ("diagnose embedded --epsilon inf", "argument --epsilon: needs a finite number"),
        ("eval embedded --window 0", "argument --window: needs at least 2, got 0"),
        ("eval embedded --stride 0", "argument --stride: needs at least 1, got 0"),
        ("eval embedded --window 8 --stride 9", "0 < stride ≤ window, got window=8, stride=9"),
        ("eval embedded --window x", "argument --window: needs a whole number, got 'x'"),
        ("choose embedded --bits 0", "argument --bits: needs a finite number above 0, got 0"),
        ("choose embedded --bits nan", "argument --bits: needs a finite number above 0"),
        ("choose embedded --bytes -1", "argument --bytes: needs a finite number above 0"),
        ("choose embedded --bits 4 --tokens 0", "argument --tokens: needs at least 1, got 0"),
        ("patch embedded --head dense --tokens -1 --output out", "--tokens: needs at least 1"),
        ("patch embedded --attention ssmax --layers= --output out", "--layers: needs values with"),
        (
            "patch embedded --attention ssmax --layers 1,a --output out",
            "a layer is an integer, got 'a'",
        ),
        ("patch embedded --head dense", "the following arguments are required: --output"),
        ("patch ./nothing --head dense --output out", "cannot load './nothing': no such folder"),
        ("eval embeded", "no such folder, and as a Hub id it is not in the cache"),
        ("eval embeded", "did you mean 'embedded'?"),
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
    error = fails(capsys, "eval", "embedded", "--data", file)
    assert "less than one window of 512; give at least 5" in error


def test_a_model_without_its_tokenizer(text, tmp_path, capsys):
    model, _ = embedded.load_embedded()
    model.save_pretrained(tmp_path / "bare")
    error = fails(capsys, "eval", tmp_path / "bare", "--data", text)
    assert "holds a model but no tokenizer" in error


# -- models that cannot be used ----------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def saved(folder, kind, auto, **settings):
    auto.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(folder)
    for file in embedded.FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def refuses_model(capsys, tmp_path, folder):
    """The reason why `patch` does not take it; nothing is written."""
    error = fails(capsys, "patch", folder, "--head", "dense", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return error


def test_an_encoder_decoder(tmp_path, capsys):
    sizes = {
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 64,
    }
    folder = saved(tmp_path / "t5", "t5", AutoModelForSeq2SeqLM, **sizes)
    error = refuses_model(capsys, tmp_path, folder)
    assert (
        "T5ForConditionalGeneration (t5) is an encoder-decoder; decoder-only language models"
        in error
    )
    assert len(error) < 400


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
def test_an_encoder(auto, tmp_path, capsys):
    folder = saved(tmp_path / "bert", "bert", auto, **TINY)
    error = refuses_model(capsys, tmp_path, folder)
    assert "(bert) is an encoder, which does not predict the next token" in error


def test_a_model_saved_without_its_head(tmp_path, capsys):
    """transformers starts a missing head at random and only logs it."""
    folder = saved(tmp_path / "base", "llama", AutoModel, tie_word_embeddings=False, **TINY)
    error = refuses_model(capsys, tmp_path, folder)
    assert "(LlamaModel) holds no weights for lm_head.weight, which LlamaForCausalLM needs" in error
    tied = saved(tmp_path / "tied", "llama", AutoModel, tie_word_embeddings=True, **TINY)
    assert main(["patch", str(tied), "--head", "dense", "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("file", ["model_index.json", "config.json"])
def test_a_folder_of_diffusers(file, tmp_path, capsys):
    (tmp_path / file).write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    error = refuses_model(capsys, tmp_path, tmp_path)
    assert "it holds UNet2DConditionModel of diffusers; decoder-only language models" in error


def test_folders_that_hold_no_model(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    assert "no config.json (it holds notes.txt)" in refuses_model(capsys, tmp_path, folder)
    assert "it is a file" in refuses_model(capsys, tmp_path, folder / "notes.txt")
    config = folder / "config.json"
    config.write_text("{")
    assert f"{config} is not JSON (line 1, column 2" in refuses_model(capsys, tmp_path, folder)
    config.write_text("[]")
    error = refuses_model(capsys, tmp_path, folder)
    assert "its config.json names no model_type" in error
    assert error.count("cannot load") == 1
    assert "cannot load '': no such folder" in refuses_model(capsys, tmp_path, "")


def test_damaged_weights(tmp_path, capsys):
    model, tokenizer = embedded.load_embedded()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    error = refuses_model(capsys, tmp_path, tmp_path / "model")
    assert "its weights are truncated or damaged" in error


def test_more_tokens_than_positions(text, tmp_path, capsys):
    _, tokenizer = embedded.load_embedded()
    settings = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2}
    saved(tmp_path / "model", "gpt2", AutoModelForCausalLM, n_positions=32, **settings)
    error = fails(capsys, "eval", tmp_path / "model", "--data", text, "--window", "64")
    assert "rows of 64 tokens were given, but GPT2LMHeadModel has a table of 32 positions" in error


# -- texts and results that cannot be used -----------------------------------------------------------------------------


def test_data_that_is_no_text(tmp_path, capsys):
    def refused(name, content):
        (tmp_path / name).write_bytes(content)
        error = fails(capsys, "eval", "embedded", "--data", tmp_path / name)
        assert f"{tmp_path / name} " in error
        return error

    assert "is not UTF-8 text (byte 0 is 0xff)" in refused("a.txt", b"\xff\xfe\x00")
    assert "is not text: it holds zero bytes" in refused("b.txt", b"ab\x00")
    assert "cannot be read as .jsonl: " in refused("c.jsonl", b'{"text": "x"}\n{"text"')
    assert "has no text column 'text', its columns are body" in refused(
        "d.jsonl", b'{"body": "x"}\n'
    )


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("{", "is not JSON (line 1, column 2"),
        ("[1]", "results are a dictionary with 'stages', got a list"),
        ('{"stages": "dense"}', "'stages' is a list of dictionaries, got a string"),
        ('{"stages": [1]}', "stage 0 is a dictionary, got a int"),
        ('{"stages": [{"name": "x"}]}', "a stage needs at least 'name' and 'perplexity'"),
        ('{"stages": [{"name": "x", "perplexity": "2"}]}', "'perplexity' of stage 'x' is a number"),
        ('{"stages": [{"name": "x", "perplexity": 2, "kl": []}]}', "'kl' of stage 'x' is a number"),
        ('{"sizes": {"head": {}}}', "'sizes' needs a 'head' and a 'dense' with numbers"),
        ('{"sizes": [1]}', "'sizes' needs a 'head' and a 'dense' with numbers"),
    ],
)
def test_card_of_other_results(results, message, exported, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(results)
    before = (exported / "README.md").read_text()
    error = fails(capsys, "card", exported, "--results", file)
    assert message in error
    assert str(file) in error
    assert (exported / "README.md").read_text() == before


def test_snippet_of_a_card_runs(exported, monkeypatch):
    card = (exported / "README.md").read_text()
    assert "pip install git+https://" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(exported.parent)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["model"].get_output_embeddings().weight.shape == (64, 192)


# -- places that cannot be written to ----------------------------------------------------------------------------------


def test_output_is_checked_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_softheads.cli.models.find", lambda _: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "killed.writing").mkdir()
    for name, message in (
        ("file", "is a file; choose another name"),
        ("file/out", "cannot write to"),
        ("killed", "is in the way: another export is running, or was killed; remove it"),
    ):
        command = ["patch", "embedded", "--head", "dense", "--output", tmp_path / name]
        assert message in fails(capsys, *command)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission to write in" in fails(capsys, *command[:-1], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_room_and_budget_are_checked_before_the_calibration(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hf_softheads, "collect", lambda *_: pytest.fail("it was calibrated"))
    command = ["choose", "embedded", "--calibrate", text, "--bits"]
    assert "no head fits into 0.001 bits" in fails(capsys, *command, "0.001")
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    error = fails(capsys, *command, "4", "--output", tmp_path / "out")
    assert "needs 18.0 MiB, only 10 B are free" in error
    assert list(tmp_path.iterdir()) == [text]
