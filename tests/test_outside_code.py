"""What others did to a head before `patch` sees it: kept, or refused before anything has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_softheads as sh
from hf_softheads.plan import plan_of

from .conftest import VOCAB, make_model


def lora(model: Any, **options: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["lm_head"]},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "lora on head and body": {"target_modules": ["lm_head", "q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_on_the_head_is_refused_until_it_is_merged(
    options: dict[str, Any], tokens: Tensor
) -> None:
    model = lora(make_model("llama"), **options)
    wanted, head = model(input_ids=tokens).logits, model.base_model.model.lm_head
    with pytest.raises(ValueError, match=r"lm_head.*merge_and_unload"):
        sh.patch(model, head=sh.heads.Dense())
    assert model.base_model.model.lm_head is head
    assert torch.equal(model(input_ids=tokens).logits, wanted)
    merged = model.merge_and_unload()
    sh.patch(merged, head=sh.heads.Dense())
    torch.testing.assert_close(merged(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_a_head_that_was_loaded(tokens: Tensor, tmp_path: Any) -> None:
    """Its matrices are in no checkpoint, but that is not what is wrong with it."""
    make_model("llama").save_pretrained(tmp_path)
    model = lora(AutoModelForCausalLM.from_pretrained(tmp_path), target_modules=["lm_head"])
    wanted = model(input_ids=tokens).logits
    with pytest.raises(ValueError, match=r"lm_head.*merge_and_unload"):
        sh.patch(model, head=sh.heads.Dense())
    merged = sh.patch(model.merge_and_unload(), head=sh.heads.Dense())
    torch.testing.assert_close(merged(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


def test_an_adapter_on_the_body_stays(tokens: Tensor) -> None:
    model = lora(make_model("llama"), target_modules=["q_proj"])
    wanted = model(input_ids=tokens).logits
    sh.patch(model, head=sh.heads.Dense())
    assert torch.equal(model(input_ids=tokens).logits, wanted)


class Scaled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * 0.5


class Normalised(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(nn.functional.normalize(hidden, dim=-1))


class Plain(nn.Linear):
    """A class of its own that computes just the product."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


def retype(kind: type[nn.Linear]) -> Callable[[nn.Module], Any]:
    def change(head: nn.Module) -> None:
        head.__class__ = kind

    return change


def instance_forward(head: nn.Module) -> None:
    original = head.forward
    head.forward = lambda hidden: original(hidden) + 1.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaled": retype(Scaled),
    "normalised": retype(Normalised),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "hook on the output": lambda head: head.register_forward_hook(lambda *a: a[2] * 1.01),
    "hook on the input": lambda head: head.register_forward_pre_hook(lambda _, a: (a[0] + 1,)),
    "forward of the instance": instance_forward,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_a_head_that_computes_more_than_a_product_is_refused(
    change: Callable[[Any], Any], training: bool, tokens: Tensor
) -> None:
    model = make_model("llama").train(training)
    change(model.lm_head)
    state = copy.deepcopy(dict(model.named_parameters()))
    wanted, head = model(tokens).logits, model.lm_head
    for module in (None, sh.attention.SSMax()):
        with pytest.raises(ValueError, match=r"lm_head.*(merge|hook)"):
            sh.patch(model, head=sh.heads.Dense(), attention=module)
    assert model.lm_head is head
    assert head.training == training
    assert plan_of(model) is None
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())
    if not training:
        torch.testing.assert_close(model(tokens).logits, wanted)


def test_a_removed_parametrization_is_merged(tokens: Tensor) -> None:
    model = make_model("llama")
    parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(2)
    wanted = model(tokens).logits
    parametrize.remove_parametrizations(model.lm_head, "weight")
    sh.patch(model, head=sh.heads.Dense())
    torch.testing.assert_close(model(tokens).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_of_another_class_that_computes_the_product_is_taken(
    dtype: torch.dtype, tokens: Tensor
) -> None:
    model = make_model("llama").to(dtype)
    model.lm_head.__class__ = Plain
    model.lm_head.register_forward_hook(lambda *_: None)  # looks, changes nothing
    wanted = model(tokens).logits
    sh.patch(model, head=sh.heads.Dense())
    torch.testing.assert_close(model(tokens).logits, wanted, atol=0.05, rtol=0.02)


def test_a_head_that_is_an_embedding_is_refused() -> None:
    """FSMT calls its decoder's input embedding the output embedding, and computes something else."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
    config = AutoConfig.for_model(
        "fsmt",
        **sizes,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        src_vocab_size=VOCAB,
        tgt_vocab_size=VOCAB,
        langs=["en", "de"],
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="cannot be called on hidden states"):
        sh.patch(model, head=sh.heads.Dense())


def test_choose_refuses_an_adapter_too(tokens: Tensor) -> None:
    model = make_model("llama")
    stats = sh.collect(model, [tokens[0]])
    with pytest.raises(ValueError, match="merge_and_unload"):
        sh.choose(lora(model, target_modules=["lm_head"]), stats, bits=8)
