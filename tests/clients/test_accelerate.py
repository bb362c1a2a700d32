"""accelerate's offloading: parts of a patched model on the CPU, on disk, and moved in for their turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import hf_softheads as sh
from tests.conftest import make_model

SPECS = [sh.heads.Dense(), sh.heads.VQ(codes=24), sh.heads.Quantized(4)]
each_head = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def patched(spec: Any) -> Any:
    return sh.patch(make_model("llama"), head=spec, attention=sh.attention.SSMax())


def load(folder: Path, device_map: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=folder / "offload", **options
    )


@pytest.mark.client("accelerate", works="`cpu_offload` and `disk_offload` of a patched model")
@pytest.mark.parametrize("where", ["cpu", "disk"])
@each_head
def test_offloading_a_patched_model(spec, where, tokens, tmp_path):
    expected = patched(spec)(tokens).logits
    if where == "cpu":
        model = cpu_offload(patched(spec), execution_device="cpu")
    else:
        model = disk_offload(patched(spec), str(tmp_path), execution_device="cpu")
    assert model.lm_head.weight.is_meta
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(tokens).logits, expected)  # weights left again


@pytest.mark.client("accelerate", works="`dispatch_model` with the body or the head on disk")
@pytest.mark.parametrize("away", ["model", "lm_head"])
@each_head
def test_dispatching_a_patched_model(spec, away, tokens, tmp_path):
    expected = patched(spec)(tokens).logits
    places = {"model": "cpu", "lm_head": "cpu", away: "disk"}
    model = dispatch_model(patched(spec), places, main_device="cpu", offload_dir=str(tmp_path))
    assert next(model.get_submodule(away).parameters()).is_meta
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.client("accelerate", works="loading a patched folder with layers of the body on disk")
@each_head
def test_loading_with_a_layer_on_disk(spec, tokens, tmp_path):
    model = patched(spec)
    model.save_pretrained(tmp_path)
    whole = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    loaded = load(tmp_path, {**dict.fromkeys(whole, "cpu"), "model.layers.1": "disk"})
    assert loaded.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.client(
    "accelerate", works='loading with the head on disk, also by `"auto"` with little memory'
)
@pytest.mark.parametrize("how", ["disk", "auto"])
@each_head
def test_loading_with_the_head_on_disk(spec, how, tokens, tmp_path):
    model = patched(spec)
    model.save_pretrained(tmp_path)
    if how == "disk":
        loaded = load(tmp_path, {"model": "cpu", "lm_head": "disk"})
    else:
        loaded = load(tmp_path, "auto", max_memory={"cpu": 20_000})
    assert loaded.lm_head.weight.is_meta
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.client("accelerate", works="patching a head while the body is on disk")
@each_head
def test_patching_under_an_offloaded_body(spec, tokens, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path, {"model": "disk", "lm_head": "cpu"})
    sh.patch(model, head=spec)
    expected = sh.patch(make_model("llama"), head=spec)(tokens).logits
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.client(
    "accelerate",
    refused="patching a head that is itself on disk",
    why="a fit reads its matrix; patch the model in memory, save it, and offload what was saved",
)
def test_patching_an_offloaded_head(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path, {"model": "cpu", "lm_head": "disk"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is not in memory .* offload what you"):
        sh.patch(model, head=sh.heads.VQ(codes=24))
    assert isinstance(model.lm_head, torch.nn.Linear)
