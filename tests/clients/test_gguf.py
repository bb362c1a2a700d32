"""Bodies from GGUF files, which transformers unpacks or keeps packed; those that it cannot save are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_softheads as sh
from tests.conftest import make_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install hf_softheads[gguf]")
transformers = pytest.importorskip("transformers", minversion="5.20")  # has GgufConfig
GgufConfig = transformers.GgufConfig

KINDS = ["F32", "F16", "Q8_0", "Q4_0"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def source() -> Any:
    return make_model("llama", intermediate_size=64)  # blocks hold 32 numbers


def write(folder: Path, kind: str = "Q8_0", architecture: str = "llama") -> str:
    """A tiny llama as llama.cpp's converter would write it; the name of the file."""
    model = source()
    config = model.config
    file = gguf.GGUFWriter(folder / "model.gguf", architecture)
    file.add_name("tiny")
    file.add_vocab_size(config.vocab_size)
    file.add_context_length(config.max_position_embeddings)
    file.add_block_count(config.num_hidden_layers)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(10000.0)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if count := heads.get(name.split(".")[-2]):  # llama.cpp rotates neighbouring pairs
            pairs = values.reshape(count, 2, -1, config.hidden_size)
            values = pairs.swapaxes(1, 2).reshape(values.shape).copy()
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(values, stored)
        file.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=stored)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return "model.gguf"


def load(folder: Path, file: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, **options
    )


@pytest.mark.client(
    "gguf", works="`GgufConfig(dequantize=True)`: F32, F16, Q8_0 and Q4_0 files, patched and saved"
)
@each_kind
def test_an_unpacked_file_is_patched_and_saved(kind, tokens, tmp_path):
    model = load(tmp_path, write(tmp_path, kind), quantization_config=GgufConfig(dequantize=True))
    with torch.no_grad():
        error = (model(tokens).logits - source()(tokens).logits).abs().max()
    # half of a block's step, times what two layers make of it; an F32 file loses nothing
    assert error <= {"F32": 0, "F16": 1e-2, "Q8_0": 0.2, "Q4_0": 2.0}[kind]
    sh.patch(model, head=sh.heads.VQ(codes=24), attention=sh.attention.SSMax())
    model.save_pretrained(tmp_path / "saved")
    assert "gguf" not in (tmp_path / "saved" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.client(
    "gguf",
    refused="a file loaded as it is, if the model may be saved later (`saving=True`, the default)",
    why="transformers cannot save it; the message names `GgufConfig(dequantize=True)`",
)
@pytest.mark.parametrize("plan", [{"head": sh.heads.VQ(codes=24)}, {"attention": "ssmax"}])
@each_kind
def test_a_body_that_cannot_be_saved_is_refused_before_the_fit(
    kind, plan, tokens, tmp_path, monkeypatch
):
    model = load(tmp_path, write(tmp_path, kind))
    before, kept = model(tokens).logits, type(model)
    monkeypatch.setattr(sh.heads.VQ, "fit", lambda *_: pytest.fail("was fitted"))
    message = r"quantized with gguf, which .* cannot save.*=GgufConfig\(dequantize=True\)"
    with pytest.raises(ValueError, match=message) as refusal:
        sh.patch(model, **plan)
    assert "\n" not in str(refusal.value)
    assert type(model) is kept
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.client("gguf", works="`patch(…, saving=False)` for a model that is only run")
def test_a_model_that_will_not_be_saved(tokens, tmp_path):
    model = load(tmp_path, write(tmp_path, "F32"))
    body = model.config.quantization_config
    sh.patch(model, head=sh.heads.VQ(codes=24), saving=False)
    expected = sh.patch(source(), head=sh.heads.VQ(codes=24))
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    sh.unpatch(model)
    assert model.config.quantization_config is body


@pytest.mark.client(
    "gguf",
    refused="a file of an architecture that transformers does not read",
    why="transformers names the architecture before anything is loaded",
)
def test_an_unknown_architecture(tmp_path):
    file = write(tmp_path, architecture="llamarama")
    with pytest.raises(ValueError, match=r"GGUF model with architecture llamarama is not support"):
        load(tmp_path, file)


@pytest.mark.client(
    "gguf",
    refused="`head=` on a file loaded as a model without an LM head",
    why="there is no head to replace; `AutoModelForCausalLM` has one",
)
def test_a_model_without_a_head(tmp_path):
    model = AutoModel.from_pretrained(
        tmp_path, gguf_file=write(tmp_path), quantization_config=GgufConfig(dequantize=True)
    )
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        sh.patch(model, head=sh.heads.VQ(codes=24))


@pytest.mark.client(
    "gguf",
    refused="patching while loading (`quantization_config=SoftheadsConfig(…)` with `gguf_file=`)",
    why="transformers has one place for both; load with `GgufConfig(dequantize=True)`, then patch",
)
def test_patching_while_loading(tmp_path):
    plan = sh.SoftheadsConfig(head=sh.heads.VQ(codes=24))
    with pytest.raises(ValueError, match=r"cannot combine Quantization and .* GGUF"):
        load(tmp_path, write(tmp_path), quantization_config=plan)


@register_quantization_config("unsaved")
class UnsavedConfig(QuantizationConfigMixin):
    def __init__(self, **_: object):
        self.quant_method = "unsaved"


@register_quantizer("unsaved")
class UnsavedQuantizer(HfQuantizer):
    """A toy that changes nothing and cannot be saved."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self):
        return False


@pytest.mark.client(
    "other quantizers",
    refused="every body whose quantizer says that it cannot be saved, unless `saving=False`",
    why="what a fit finds would be lost; the message names the quantizer",
)
@pytest.mark.parametrize("how", ["live", "inner"])
def test_every_quantizer_that_cannot_be_saved(how, tokens, tmp_path):
    source().save_pretrained(tmp_path)
    plan = sh.SoftheadsConfig(head="dense", inner={"quant_method": "unsaved"})
    message = "quantized with unsaved, which .* load it without that quantizer, or .*saving=False"
    if how == "inner":
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=plan)
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=UnsavedConfig())
    with pytest.raises(ValueError, match=message):
        sh.patch(model, head="dense")
    assert torch.equal(
        sh.patch(model, head="dense", saving=False)(tokens).logits, source()(tokens).logits
    )


def test_what_is_written_says_nothing_of_saving(tmp_path):
    sh.patch(source(), head="dense").save_pretrained(tmp_path)
    plan = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "saving" not in plan
    assert plan["inner"] is None
