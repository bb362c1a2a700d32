"""Models written as GGUF files, read back by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_softheads as sh
from hf_softheads.cli import main
from hf_softheads.heads.fit import ggml_types
from hf_softheads.heads.fit.hessian import local_moments
from hf_softheads.text import embedded
from tests.conftest import make_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install hf_softheads[gguf]")
pytest.importorskip("transformers", minversion="5.20")

SIZES = {"intermediate_size": 64}  # blocks hold 32 numbers
TEXT = "def f(x):\n    return x ** 2"


def byte_tokenizer(vocab: int) -> Any:
    """A byte-level BPE of the bytes of ASCII text and two merges."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()))[: vocab - 5]
    letters += [c for c in "ĠĊ" if c not in letters]
    known = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{c: i + 3 for i, c in enumerate(letters[: vocab - 5])},
    }
    known |= {"ab": vocab - 2, "Ġa": vocab - 1}
    backend = Tokenizer(models.BPE(vocab=known, merges=[("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def small(family: str = "llama", vocab: int = 300, **changes: Any) -> Any:
    return make_model(family, **{**SIZES, "vocab_size": vocab, **changes})


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer(300)


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


def stored(folder: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.client(
    "gguf",
    works='`export(…, format="gguf")` of llama and Gemma 3 models, tied or not, to Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1 and '
    "Q8_0; the tokenizer and the model read back by `gguf_file=`",
)
@pytest.mark.parametrize(
    ("family", "tied", "kind"),
    [
        *[("llama", True, "Q4_0"), ("llama", False, "Q5_1"), ("llama", False, "IQ4_NL")],
        *[("gemma3_text", True, "Q4_1"), ("gemma3_text", True, "Q8_0"), ("llama", True, "Q5_0")],
    ],
)
def test_logits_are_those_of_the_rounded_rows(family, tied, kind, tokenizer, tmp_path):
    wide = {"head_dim": 256, "num_attention_heads": 1, "num_key_value_heads": 1}
    changes = wide if family == "gemma3_text" else {}
    model = small(family, tie_word_embeddings=tied, **changes)
    tokens = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    stats = sh.collect(model, tokens)
    out = sh.export(
        model, tmp_path / "out", tokenizer, format="gguf", head=kind, body="f32", stats=stats
    )
    table = stored(out)["token_embd.weight" if tied else "output.weight"]
    assert table.tensor_type == gguf.GGMLQuantizationType[kind]
    assert ("output.weight" in stored(out)) != tied
    rows = torch.from_numpy(gguf.quants.dequantize(table.data, table.tensor_type))
    again = read(out)
    with torch.no_grad():
        model.lm_head.weight.copy_(rows)
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    reread = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    assert reread("ab a").input_ids == tokenizer("ab a").input_ids == [298, 299]


@pytest.mark.parametrize("body", ["f16", "bf16", "q8_0"])
def test_the_body_has_the_asked_type(body, tokenizer, tmp_path):
    model = small()
    out = sh.export(model, tmp_path / "out", tokenizer, format="gguf", body=body)
    kinds = {name: t.tensor_type.name for name, t in stored(out).items()}
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == body.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["output.weight"] in ("Q4_0", "IQ4_NL")  # 4.5 bits
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, wanted = read(out)(tokens).logits, model(tokens).logits
    assert (found - wanted).abs().max() < 0.15 * wanted.abs().max()


@pytest.mark.parametrize(("bits", "tried"), [(4.5, 2), (5.0, 3), (5.7, 3), (8.5, 1), (99, 1)])
def test_types_within_the_bits_are_tried(bits, tried, tokenizer, tmp_path, monkeypatch):
    fits, losses = [], {}
    whole = ggml_types.fit_blocks

    def watched(weight, kind, metrics):
        fits.append(kind.name)
        found = whole(weight, kind, metrics)
        losses[kind.name] = (found.rows() - weight).square().mean()
        return found

    monkeypatch.setattr("hf_softheads.exporting.gguf_file.fit_blocks", watched)
    out = sh.export(small(), tmp_path / "out", tokenizer, format="gguf", bits=bits)
    assert len(fits) == tried
    assert all(ggml_types.TYPES[name].bits <= bits for name in fits)
    assert stored(out)["output.weight"].tensor_type.name == min(losses, key=losses.get)


def test_with_statistics_rows_are_rounded_with_feedback(tokenizer, tmp_path):
    model = small()
    weight = model.lm_head.weight.detach()
    stats = sh.collect(model, torch.randint(3, 300, (8, 48)))
    tables = {}
    for name, known in {"fitted": stats, "plain": None}.items():
        out = sh.export(model, tmp_path / name, tokenizer, format="gguf", head="Q4_0", stats=known)
        tables[name] = torch.tensor(stored(out)["output.weight"].data)
    kind = ggml_types.TYPES["Q4_0"]
    expected = ggml_types.fit_blocks(weight, kind, local_moments(stats, weight)).packed()
    assert torch.equal(tables["fitted"], expected)
    assert torch.equal(tables["plain"], ggml_types.fit_blocks(weight, kind, None).packed())
    assert not torch.equal(tables["plain"], tables["fitted"])


@pytest.mark.client(
    "gguf",
    refused='`format="gguf"` for other architectures, patched models, settings without a place in the file',
    why="the message names the architectures that work, or the settings",
)
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {}, r"cannot hold a Qwen3ForCausalLM \(qwen3\); it writes llama and gemma3_text"),
        ("llama", {"attention_bias": True}, "no place for .* attention_bias=True"),
        ("llama", {"hidden_size": 48}, "has 48 columns; types of ggml need a multiple of 32"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "no place for .* rope_parameters=.*linear",
        ),
        ("gemma3_text", {}, "no place for .* query_pre_attn_scalar=256"),
        (
            "gemma3_text",
            {
                "query_pre_attn_scalar": 8,
                "layer_types": ["full_attention"] * 2,
            },
            "no place for .* layer_types=",
        ),
    ],
)
def test_what_a_file_cannot_say(family, changes, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        sh.export(small(family, **changes), tmp_path / "out", tokenizer, format="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "Q9_0"}, "no head type 'Q9_0'; did you mean "),
        ({"body": "q8"}, "no body type 'q8'; did you mean 'q8_0'"),
        ({"bits": 4}, "no type of ggml fits into 4 bits; the smallest has 4.5"),
        ({"tokenizer": None}, "holds the tokenizer too; give tokenizer="),
        ({"bit": 4}, "format='gguf' has no option 'bit'; did you mean 'bits'"),
    ],
)
def test_wrong_options(options, message, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, **options}
    with pytest.raises(ValueError, match=message):
        sh.export(small(), tmp_path / "out", format="gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_patched_models_and_wrong_tokenizers(tokenizer, tmp_path):
    model = sh.patch(small(), head=sh.heads.Quantized(4))
    with pytest.raises(ValueError, match=r"cannot hold patched parts; give the original model"):
        sh.export(model, tmp_path / "out", tokenizer, format="gguf")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"no name for how this tokenizer cuts text \(Whitespace"):
        sh.export(small(), tmp_path / "out", tokenizer, format="gguf")
    with pytest.raises(ValueError, match="writes fast BPE tokenizers, got str"):
        sh.export(small(), tmp_path / "out", "tokenizer", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 400)
    out = tmp_path / "out"
    options = f"--format gguf --head Q4_0 --body q8_0 --calibrate {text} --tokens 1024"
    with pytest.warns(UserWarning, match="need about 3,072"):
        assert main(["export", "embedded", str(out), *options.split()]) == 0
    assert f"saved to {out}" in capsys.readouterr().out
    assert [p.name for p in out.iterdir()] == ["model.gguf"]
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    own = embedded.load_embedded()[1]
    assert tokenizer(TEXT).input_ids == own(TEXT).input_ids
    assert main(["export", "embedded", str(tmp_path / "o"), "--bits", "4.5"]) == 2
    assert "format='transformers' has no option 'bits'" in capsys.readouterr().err
