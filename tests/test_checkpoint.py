"""Saving and loading in every way transformers offers, and what damaged or foreign folders get."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_softheads as sh
from hf_softheads.config import FORMAT_VERSION
from hf_softheads.exporting import export

from .conftest import VOCAB, make_model


@pytest.fixture
def patched():
    return sh.patch(make_model("llama"), head=sh.heads.VQ(codes=24), attention=sh.attention.SSMax())


@pytest.fixture
def folder(patched, tmp_path):
    patched.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


LOADS = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import torch
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)
for folder in sys.argv[2:]:
    try:
        load(folder)
    except Exception as error:
        print(str(error).strip().splitlines()[-1])
import hf_softheads
with torch.no_grad():
    logits = load(sys.argv[2])(load_file(sys.argv[1])["tokens"]).logits
save_file({"logits": logits}, sys.argv[1] + ".out")
"""


def test_a_fresh_process_gives_the_same_logits_and_none_without_the_plugin(
    patched, folder, tokens, tmp_path
):
    save_file({"tokens": tokens}, tmp_path / "tokens")
    head = sh.patch(make_model("llama"), head=sh.heads.VQ(codes=24))
    head.save_pretrained(tmp_path / "head")
    arguments = [tmp_path / "tokens", folder, tmp_path / "head"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.count("hf_softheads") > 0 for line in done.stdout.splitlines()] == [True, True]
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "tokens.out")["logits"], patched(tokens).logits)


@pytest.mark.parametrize("attention", [None, "ssmax"])
def test_both_markers_are_in_the_folder(attention, tmp_path):
    """The key that transformers reads now, and the one that its older versions do."""
    model = sh.patch(make_model("llama"), head=sh.heads.VQ(codes=24), attention=attention)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attn_implementation"] == "hf_softheads"
    assert config["_attn_implementation"] == "hf_softheads"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")  # a loaded model is marked as well
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"dtype": torch.bfloat16}],
    ids=["plain", "auto", "cpu", "bf16"],
)
def test_sharded_and_dispatched(tied, options, tokens, tmp_path):
    model = make_model("llama", tie_word_embeddings=tied)
    stats = sh.collect(model, tokens.repeat(8, 1), window=12)
    sh.patch(model, head=sh.heads.VQ.repaired(24), attention=sh.attention.SSMax(), stats=stats)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    if "dtype" in options:  # what is saved, cast: all but the tensors that half precision spoils
        for name, p in model.named_parameters():
            if ".softheads." not in name and name != "lm_head.bias":
                p.data = p.data.to(options["dtype"])
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype, name
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_bf16_round_trip_is_bit_exact(tokens, tmp_path):
    model = make_model("llama").to(torch.bfloat16)
    stats = sh.collect(make_model("llama"), tokens.repeat(8, 1), window=12)
    sh.patch(
        model, head=sh.heads.VQ.repaired(codes=24), attention=sh.attention.SSMax(), stats=stats
    )
    assert model.get_output_embeddings().bias.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_patch_while_loading(tokens, tmp_path):
    dense = make_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    plan = sh.SoftheadsConfig(head=sh.heads.VQ(codes=24), attention="ssmax", layers=[1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=plan)
    wanted = sh.patch(dense, head=sh.heads.VQ(codes=24), attention="ssmax", layers=[1])
    assert torch.equal(model(tokens).logits, wanted(tokens).logits)
    assert not hasattr(model.model.layers[0].self_attn, "softheads")
    model.save_pretrained(tmp_path / "patched")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert torch.equal(again(tokens).logits, wanted(tokens).logits)


def test_copies_and_pickles(patched, tokens):
    wanted = patched(tokens).logits
    assert torch.equal(copy.deepcopy(patched)(tokens).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(patched))(tokens).logits, wanted)


def test_loaded_model_trains_as_an_ordinary_one(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_peft_on_top(folder, tokens, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head", "softheads"],
        init_lora_weights=False,
    )
    model = get_peft_model(base, lora).train()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in trained)
    assert any("lm_head.modules_to_save.default.weight" in name for name in trained)
    assert any("softheads.modules_to_save.default.s" in name for name in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.add_(0.01 * torch.randn_like(p))
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        assert torch.equal(again.eval()(input_ids=tokens).logits, wanted)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, merged(input_ids=tokens).logits)


@pytest.mark.parametrize("spec", [sh.heads.Dense(), sh.heads.VQ(codes=24)], ids=lambda s: s.name)
def test_heads_are_resized(spec, tokens, tmp_path):
    model = sh.patch(make_model("llama"), head=spec)
    before = model(tokens).logits
    model.resize_token_embeddings(VOCAB + 5)
    after = model(tokens).logits
    assert after.shape[-1] == VOCAB + 5
    torch.testing.assert_close(after[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, after)


def test_a_head_that_cannot_be_resized_refuses_before_anything_changed(tokens):
    patched = sh.patch(make_model("llama"), head=sh.heads.Quantized(4))
    before = patched(tokens).logits
    with pytest.raises(NotImplementedError, match="cannot be resized from 96 to 101 tokens"):
        patched.resize_token_embeddings(VOCAB + 5)
    assert len(patched.get_input_embeddings().weight) == VOCAB
    assert torch.equal(patched(tokens).logits, before)


# -- damaged and foreign folders ---------------------------------------------------------------------------------------


def test_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_corrupted_header_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_newer_format_asks_for_an_upgrade(folder, version):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"newer hf_softheads.*upgrade"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_damaged_format_is_refused(folder, version):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_unknown_variant_in_a_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["head"]["name"] = "vqq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown head variant 'vqq'; did you mean 'vq'"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("version", [1])
def test_every_released_format_still_loads(version):
    """A folder that was written once and is never written again."""
    fixtures = Path(__file__).parent / "fixtures"
    expected = load_file(fixtures / f"format_{version}_expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(fixtures / f"format_{version}")
    with torch.no_grad():
        found = model(expected["tokens"]).logits
    torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=1e-5)


# -- exports -----------------------------------------------------------------------------------------------------------


def test_export_does_not_overwrite(patched, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        export(patched, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]


def test_export_to_a_place_that_cannot_be_written(patched, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        export(patched, tmp_path / "file" / "out")


def test_export_to_a_full_disk_leaves_nothing(patched, tmp_path, monkeypatch):
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match="only 10 B are free"):
        export(patched, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_interrupted_in_the_middle_leaves_nothing(patched, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_softheads.report.cards.write_card", fail)
    with pytest.raises(OSError, match="No space left"):
        export(patched, tmp_path / "out", results={"stages": []})
    assert list(tmp_path.iterdir()) == []


# -- a real quantizer of the backbone ----------------------------------------------------------------------------------


@register_quantization_config("halving")
class HalvingConfig(QuantizationConfigMixin):
    def __init__(self, **_: object):
        self.quant_method = "halving"


@register_quantizer("halving")
class HalvingQuantizer(HfQuantizer):
    """A toy: every `nn.Linear` that it finds computes half of what it did."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **_):
        self.found = [
            name
            for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and name != "lm_head"
        ]
        for name in self.found:
            model.get_submodule(name).register_forward_hook(lambda _, __, out: out / 2)

    def is_serializable(self, *_, **__):
        return True

    @property
    def is_trainable(self):
        return False


def test_a_quantizer_of_the_backbone_is_carried_inside(tokens, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "dense")
    plan = sh.SoftheadsConfig(head=sh.heads.VQ(codes=24), inner={"quant_method": "halving"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=plan)
    assert isinstance(model.hf_quantizer, HalvingQuantizer)
    assert not model.hf_quantizer.pre_quantized
    model.save_pretrained(tmp_path / "patched")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert again.hf_quantizer.pre_quantized
    assert "lm_head" not in again.hf_quantizer.found
    assert len(again.hf_quantizer.found) == 14
    hidden = [m.model.layers[0].mlp(torch.ones(1, 1, 32)) for m in (again, make_model("llama"))]
    torch.testing.assert_close(hidden[0], _halved_mlp(make_model("llama").model.layers[0].mlp))
    assert not torch.equal(hidden[0], hidden[1])


def _halved_mlp(mlp):
    x = torch.ones(1, 1, 32)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x) / 2) * (mlp.up_proj(x) / 2)) / 2
