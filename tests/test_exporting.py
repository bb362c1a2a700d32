"""`export` and `softheads export` in the formats of other software: what they hold, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import hf_softheads as sh
from hf_softheads.cli import main
from tests.conftest import VOCAB, make_model

PACKED = "compressed-tensors"


def integers(bits: int = 4, **fields: int) -> sh.heads.Quantized:
    return sh.heads.Quantized(bits, levels="integers", **fields)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of `bits` bits from the lowest bits of each word up, 0 in the middle."""
    wide = words.long() & 0xFFFFFFFF
    numbers = [(wide >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return torch.stack(numbers, -1).flatten(1) - 2 ** (bits - 1)


@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 8), (8, None)])
def test_a_packed_head_is_the_same_matrix(bits, group, tmp_path):
    model = sh.patch(make_model("llama"), head=integers(bits, group=group), tie=False)
    rows = model.lm_head.rows(slice(None)).detach()
    tensors = load_file(sh.export(model, tmp_path / "out", format=PACKED) / "model.safetensors")
    scale = tensors["lm_head.weight_scale"]
    found = unpacked(tensors["lm_head.weight_packed"], bits) * scale.repeat_interleave(
        32 // scale.shape[1], 1
    )
    assert torch.equal(found, rows)
    assert tensors["lm_head.weight_shape"].tolist() == [VOCAB, 32]
    config = (tmp_path / "out" / "config.json").read_text()
    assert "softheads" not in config
    (group_0,) = json.loads(config)["quantization_config"]["config_groups"].values()
    assert group_0["targets"] == ["lm_head"]
    assert group_0["weights"]["group_size"] == group


def test_a_width_that_fills_no_word(tmp_path):
    model = make_model("gpt2", n_embd=36)
    rows = sh.patch(model, head=integers(4), tie=False).lm_head.rows(slice(None)).detach()
    tensors = load_file(sh.export(model, tmp_path / "out", format=PACKED) / "model.safetensors")
    found = unpacked(tensors["lm_head.weight_packed"], 4)[:, :36] * tensors["lm_head.weight_scale"]
    assert tensors["lm_head.weight_packed"].shape == (VOCAB, 5)
    assert torch.equal(found, rows)


def test_a_tied_embedding_becomes_dense(tmp_path):
    model = sh.patch(make_model("gemma3_text", tie_word_embeddings=True), head=integers(), tie=True)
    with pytest.warns(UserWarning, match="embed_tokens reads .* as a dense matrix of 12.0 KiB"):
        sh.export(model, tmp_path / "out", format=PACKED)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    names = {name for name in tensors if name.startswith("model.embed_tokens.")}
    assert names == {"model.embed_tokens.weight"}
    table = tensors["model.embed_tokens.weight"]
    every = model.model.embed_tokens(torch.arange(VOCAB)) / 32**0.5  # without Gemma's factor
    torch.testing.assert_close(table, every.detach())
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


COULD = "holds `quantized` heads of 4 or 8 bits with levels='integers'"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, f"the dense head of this LlamaForCausalLM; it {COULD}"),
        ({"attention": "softmax"}, f"the dense head of this LlamaForCausalLM; it {COULD}"),
        ({"head": sh.heads.VQ(codes=24)}, rf"the head vq\(codes=24\); it {COULD}"),
        ({"head": sh.heads.Quantized(4)}, rf"the head quantized\(\); it {COULD}"),
        ({"head": integers(2)}, rf"the head quantized\(bits=2, levels=integers\); it {COULD}"),
        (
            {"head": integers(), "attention": "softmax"},
            "the patched attention of this model, which runs only with this package",
        ),
    ],
)
def test_what_the_packed_format_cannot_hold(plan, message, tmp_path):
    model = sh.patch(make_model("llama"), **plan) if plan else make_model("llama")
    with pytest.raises(ValueError, match=rf"format='compressed-tensors' cannot hold {message}"):
        sh.export(model, tmp_path / "out", format=PACKED)
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_is_quantized_is_refused(tmp_path):
    model = sh.patch(make_model("llama"), head=integers())
    model.config.quantization_config.inner = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantized with bitsandbytes; load the model unquantized"):
        sh.export(model, tmp_path / "out", format=PACKED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "ggup"}, "there is no format 'ggup'; "),
        ({"format": PACKED, "bits": 4}, "format='compressed-tensors' has no option 'bits'"),
        ({"bits": 4}, "format='transformers' has no option 'bits'; "),
        ({"format": PACKED, "results": {}}, "are for the card of format='transformers'"),
    ],
)
def test_unknown_formats_and_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sh.export(make_model("llama"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    model = sh.patch(make_model("llama"), head=integers())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        sh.export(model, tmp_path / "full", format=PACKED)
    monkeypatch.setattr("hf_softheads.files.shutil.disk_usage", lambda _: type("", (), {"free": 9}))
    with pytest.raises(OSError, match=r"needs .* only 9 B are free"):
        sh.export(model, tmp_path / "out", format=PACKED)
    monkeypatch.undo()

    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.config.__class__, "save_pretrained", lambda *_, **__: stop(0))
    with pytest.raises(KeyboardInterrupt):
        sh.export(model, tmp_path / "out", format=PACKED)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_command(tmp_path, capsys):
    packed, out = tmp_path / "packed", tmp_path / "out"
    head = "--head quantized --set head.levels=integers --set head.group=64"
    assert main([*f"patch embedded {head} --output {packed}".split()]) == 0
    assert main(["export", str(packed), str(out), "--format", PACKED]) == 0
    assert f"saved to {out}" in capsys.readouterr().out
    assert (out / "tokenizer.json").is_file()
    assert "softheads" not in (out / "config.json").read_text()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("embedded out --format ggup", "argument --format: invalid choice: 'ggup'"),
        ("embedded out --format compressed-tensors", "cannot hold the dense head"),
        ("embedded .", "exists and is not empty; choose another folder"),
        ("file out", "cannot load 'file': it is a file"),
        ("embedded file", "file is a file; choose another name for the folder"),
    ],
)
def test_wrong_input_is_one_line(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"\x00\xff\x00")
    assert main(["export", *command.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("softheads export: ")
    assert message in error
    assert "\n" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
