"""PEFT adapters on top of a patched model: train, save, reload, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import hf_softheads as sh
from tests.clients.samples import HEADS, patched
from tests.conftest import make_model


def adapters(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options)


def train(model: Any, tokens: torch.Tensor) -> set[str]:
    """One step; the names of the parameters that got a gradient."""
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    model.eval()
    return reached


@torch.no_grad()
def check_reload_and_merge(model: Any, name: str, tokens: torch.Tensor, folder: Path) -> None:
    wanted = model(input_ids=tokens).logits
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(patched(name), folder / "adapter").eval()
    assert torch.equal(again(input_ids=tokens).logits, wanted)
    merged = model.merge_and_unload()
    # adding the adapter to the weights rounds differently, and a head may amplify that
    torch.testing.assert_close(merged(input_ids=tokens).logits, wanted, rtol=1e-3, atol=1e-3)
    expected = merged(input_ids=tokens).logits
    merged.save_pretrained(folder / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert torch.equal(loaded(tokens).logits, expected)


@pytest.mark.client(
    "peft", works="LoRA on the body under every head: train, save, reload, merge, save"
)
@pytest.mark.parametrize("name", HEADS)
def test_lora_on_the_body(name, tokens, tmp_path):
    model = get_peft_model(patched(name), adapters())
    before = model(input_ids=tokens).logits
    assert any("lora_B" in parameter for parameter in train(model, tokens))
    assert not torch.equal(model(input_ids=tokens).logits, before)
    check_reload_and_merge(model, name, tokens, tmp_path)


@pytest.mark.client("peft", works="DoRA on the body")
@pytest.mark.parametrize("name", ["dense", "vq", "quantized"])
def test_dora_on_the_body(name, tokens, tmp_path):
    model = get_peft_model(patched(name), adapters(use_dora=True))
    assert any("lora_magnitude" in parameter for parameter in train(model, tokens))
    check_reload_and_merge(model, name, tokens, tmp_path)


@pytest.mark.client("peft", works='`modules_to_save=["lm_head"]` trains and keeps every head')
@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_modules_to_save(name, tokens, tmp_path):
    base = patched(name)
    trainable = any(p.requires_grad for p in base.lm_head.parameters())
    model = get_peft_model(base, adapters(modules_to_save=["lm_head"]))
    reached = train(model, tokens)
    assert trainable
    assert any("lm_head.modules_to_save" in parameter for parameter in reached)
    assert not any("lm_head.original_module" in parameter for parameter in reached)
    check_reload_and_merge(model, name, tokens, tmp_path)


@pytest.mark.client(
    "peft",
    refused="LoRA on the patched head itself",
    why="PEFT knows no layer of that class and names it; train the head with `modules_to_save`",
)
@pytest.mark.parametrize("name", HEADS)
def test_lora_on_a_patched_head(name):
    model = patched(name)
    with pytest.raises(ValueError, match=f"Target module {type(model.lm_head).__name__}"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))


@pytest.mark.client("peft", works='`target_modules="all-linear"` leaves a patched head alone')
def test_all_linear(tokens):
    model = get_peft_model(patched("vq"), LoraConfig(r=2, target_modules="all-linear"))
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 14
    assert not any("lm_head" in name for name in adapted)


@pytest.mark.client(
    "peft",
    refused="loading the base of an adapter by its name (`AutoPeftModelForCausalLM`) after training on a model patched "
    "in memory",
    why="that folder holds the original; save the patched model and load it before the adapter is put on",
)
def test_an_adapter_does_not_name_the_original_as_its_base(tokens, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "original")
    base = sh.patch(AutoModelForCausalLM.from_pretrained(tmp_path / "original"), head="dense")
    base.save_pretrained(tmp_path / "patched")
    model = get_peft_model(base, adapters(init_lora_weights=False))
    with pytest.warns(UserWarning, match="Could not find a config file in .*patched_in_memory"):
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((OSError, ValueError), match="hf_softheads/assets/patched_in_memory"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    model = get_peft_model(base, adapters(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)
