"""Families beyond those of every other test: a control, causality, padding and a cache in each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import hf_softheads as sh
from tests.attention.test_models import close, left_pad
from tests.conftest import SIZES
from tests.test_family_losses import speech_to_text, whisper

sa = sh.attention
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MORE: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo": {},
    "phi": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, **_EXPERTS},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}


@pytest.mark.parametrize("name", MORE)
def test_patched(name: str, tokens: Tensor) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **MORE[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        want = model(tokens).logits
        sh.patch(model, attention=sa.Softmax())
        close(model(tokens).logits, want, 1e-5)
        sh.unpatch(model)
        assert torch.equal(model(tokens).logits, want)
        sh.patch(model, attention=sa.Sigmoid(bias=-2.0))
        whole = model(tokens).logits
        assert (whole - want).abs().max() > 1e-4
        changed = tokens.clone()
        changed[:, 8:] = 5
        close(model(changed).logits[:, :8], whole[:, :8], 1e-5)
        close(model(**left_pad(tokens, 5)).logits[:, 5:], whole)
        first = model(tokens[:, :7], use_cache=True)
        rest = model(tokens[:, 7:], past_key_values=first.past_key_values, use_cache=True)
        close(torch.cat([first.logits, rest.logits], 1), whole)


@pytest.mark.parametrize("make", [whisper, speech_to_text])
def test_a_decoder_that_listens(make: Any, tokens: Tensor, tmp_path: Any) -> None:
    model = make()
    shape = (2, 8, 40) if make is whisper else (2, 40, 8)
    heard = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch = {"input_features": heard, "decoder_input_ids": tokens % 64}
    with torch.no_grad():
        want = model(**batch).logits
        sh.patch(model, attention=sa.Softmax())
        close(model(**batch).logits, want, 1e-5)
        sh.unpatch(model)
        sh.patch(model, attention=sa.Sigmoid(bias=-2.0))
        changed = [name for name, _ in model.named_modules() if name.endswith("softheads")]
        assert changed == ["model.decoder.layers.0.self_attn.softheads"]  # not what listens
        found = model(**batch).logits
        assert (found - want).abs().max() > 1e-4
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(**batch).logits, found)
