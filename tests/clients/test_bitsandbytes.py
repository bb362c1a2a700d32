"""bitsandbytes' 4-bit layers as the body of a patched model, on the CPU."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

import hf_softheads as sh
from tests.clients import quantized_bodies as bodies

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes"
)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LAYER = bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Params4bit


def four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.client("bitsandbytes", works="a 4-bit body, then `patch`, save, load, `unpatch`")
def test_patched_after_loading(tokens, tmp_path):
    bodies.check_patched_after_loading(four_bits(), *LAYER, tokens, tmp_path)


@pytest.mark.client("bitsandbytes", works="4 bits and a patch while loading (`inner=`)")
def test_patched_while_loading(tokens, tmp_path):
    bodies.check_patched_while_loading(four_bits(), *LAYER, tokens, tmp_path)


@pytest.mark.client(
    "bitsandbytes",
    works="a loaded folder, unpatched and saved with `save_original_format=False`",
)
def test_a_loaded_folder(tokens, tmp_path):
    bodies.check_loaded_folder(four_bits(), tokens, tmp_path)


@pytest.mark.client("bitsandbytes", works="QLoRA under a patched head")
def test_qlora(tokens, tmp_path):
    bodies.save_dense(tmp_path)
    model = sh.patch(bodies.quantized(tmp_path, four_bits()), head=bodies.SPEC)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapted = get_peft_model(model, lora).train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    reached = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_B" in name for name in reached)
    assert any("lm_head.modules_to_save" in name for name in reached)


@pytest.mark.client(
    "bitsandbytes",
    refused="`head=` where bitsandbytes quantized the head too",
    why="a fit reads the original matrix; keep the head out with `llm_int8_skip_modules`",
)
def test_a_quantized_head(tmp_path):
    bodies.save_dense(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["none"])
    model = bodies.quantized(tmp_path, config)
    assert isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    with pytest.raises(ValueError, match=r"lm_head\.weight is quantized \(torch\.uint8\)"):
        sh.patch(model, head=bodies.SPEC)
    assert isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    assert model.lm_head.weight.dtype == torch.uint8
