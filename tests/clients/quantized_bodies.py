"""What a patched model on a real quantizer's body must do, whichever quantizer it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_softheads as sh
from tests.conftest import make_model

SPEC = sh.heads.VQ(codes=24)


def save_dense(folder: Path) -> Any:
    """A model whose layers are wide enough to be quantized, written to `folder / "dense"`."""
    model = make_model("llama", hidden_size=64, intermediate_size=64, head_dim=16)
    model.save_pretrained(folder / "dense")
    return model


def quantized(folder: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)


@torch.no_grad()
def check_saved(model: Any, layer: type, weight: type, body: Tensor, tokens: Tensor, folder: Path):
    """Saved and loaded again: the same quantized layers, the patched head, the same numbers."""
    assert torch.equal(model.model(tokens).last_hidden_state, body)
    model.save_pretrained(folder / "patched")
    plan = json.loads((folder / "patched" / "config.json").read_text())["quantization_config"]
    assert plan["quant_method"] == "softheads"
    assert plan["inner"]
    again = AutoModelForCausalLM.from_pretrained(folder / "patched")
    for one in (model, again):
        layers = [m for m in one.model.modules() if type(m) is layer]
        assert len(layers) == 14
        assert all(isinstance(m.weight, weight) for m in layers)
        assert isinstance(one.lm_head, type(SPEC.module(64, 96)))
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    return again


@torch.no_grad()
def check_patched_after_loading(
    config: Any, layer: type, weight: type, tokens: Tensor, folder: Path
):
    save_dense(folder)
    model = quantized(folder, config)
    own = model.config.quantization_config
    body = model.model(tokens).last_hidden_state
    before = model(tokens).logits
    sh.patch(model, head=SPEC)
    again = check_saved(model, layer, weight, body, tokens, folder)
    sh.unpatch(model)
    assert model.config.quantization_config is own
    assert torch.equal(model(tokens).logits, before)
    assert type(again.hf_quantizer) is type(model.hf_quantizer)


@torch.no_grad()
def check_patched_while_loading(
    config: Any, layer: type, weight: type, tokens: Tensor, folder: Path
):
    save_dense(folder)
    body = quantized(folder, config).model(tokens).last_hidden_state
    plan = sh.SoftheadsConfig(head=SPEC, inner=config.to_dict())
    check_saved(quantized(folder, plan), layer, weight, body, tokens, folder)


@torch.no_grad()
def check_loaded_folder(config: Any, tokens: Tensor, folder: Path):
    """A loaded folder, unpatched and saved again, is the quantized model as it was."""
    save_dense(folder)
    model = quantized(folder, config)
    before = model(tokens).logits
    sh.patch(model, attention=sh.attention.Sigmoid()).save_pretrained(folder / "patched")
    loaded = sh.unpatch(AutoModelForCausalLM.from_pretrained(folder / "patched"))
    # transformers cannot turn loaded quantized weights back into their first format, patched or not
    loaded.save_pretrained(folder / "plain", save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(folder / "plain")
    assert (
        again.config.quantization_config.quant_method
        == model.hf_quantizer.quantization_config.quant_method
    )
    assert torch.equal(again(tokens).logits, before)
