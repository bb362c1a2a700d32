"""`unpatch` puts back everything: modules, hooks, ties, settings, the class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import hf_softheads as sh

from .conftest import FAMILIES, SIZES, make_model
from .encoder_decoders import make_seq2seq

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that could tell a patched model from the original one."""
    found: dict[str, Any] = {"class": type(model), "config": model.config.to_dict()}
    for path, module in model.named_modules():
        fields = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
        fields["hooks"] = [dict(getattr(module, name)) for name in _HOOKS]
        fields["children"] = {name: id(child) for name, child in module.named_children()}
        fields["parameters"] = {n: id(p) for n, p in module.named_parameters(recurse=False)}
        found[path] = fields
        if hasattr(module, "config"):
            found[f"{path} config"] = dict(vars(module.config))
    fields = {k: v for k, v in vars(model).items() if k not in ("_modules", "_parameters")}
    found["dict"] = {k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()}
    return found


PATCHES: dict[str, list[dict[str, Any]]] = {
    "head": [{"head": sh.heads.VQ(codes=24)}],
    "attention": [{"attention": sh.attention.Gated()}],  # reads the layer's input: a hook
    "both": [{"head": "dense", "attention": sh.attention.Gated()}],
    "one after the other": [{"attention": {0: sh.attention.Gated()}}, {"head": "dense"}],
}


@pytest.mark.parametrize("patches", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_nothing_of_a_patch_stays(
    family: str, tied: bool, patches: list[dict[str, Any]], tokens: Tensor
) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    before, logits = state(model), model(tokens).logits
    for patch in patches:
        sh.patch(model, **patch)
    assert state(model) != before
    sh.unpatch(model)
    assert state(model) == before
    assert torch.equal(model(tokens).logits, logits)


def test_settings_that_were_changed_meanwhile_stay(tokens: Tensor) -> None:
    model = make_model("llama")
    sh.patch(model, head="dense", attention="ssmax")
    model.config.use_cache = False
    model.train()
    sh.unpatch(model)
    assert model.config.use_cache is False
    assert model.training


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_copy_of_a_patched_model_is_unpatched_by_itself(family: str, tokens: Tensor) -> None:
    model = make_model(family)
    logits = model(tokens).logits
    sh.patch(model, head="dense", attention="softmax")
    twin = copy.deepcopy(model)
    sh.unpatch(twin)
    assert "quantization_config" not in twin.config.to_dict()
    assert "quantization_config" in model.config.to_dict()
    assert torch.equal(twin(tokens).logits, logits)
    assert model.config._attn_implementation == "hf_softheads"


def test_an_objective_of_the_trainer_adds_two_hooks_and_takes_them_off() -> None:
    model = make_model("llama")
    before = state(model)
    goal = sh.trainer_loss(model)
    changed = {key for key, value in state(model).items() if value != before[key]}
    assert changed == {"", "dict"}
    assert {k for k, v in vars(model).items() if callable(v)} == set()
    goal.remove()
    assert state(model) == before


def phi(tied: bool) -> Any:
    """Its head has a bias."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **SIZES, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    nn.init.normal_(model.lm_head.bias)
    return model


RESIZED: dict[str, Callable[[], Any]] = {
    "llama": lambda: make_model("llama"),
    "llama, tied": lambda: make_model("llama", tie_word_embeddings=True),
    "gemma2, tied": lambda: make_model("gemma2", tie_word_embeddings=True),
    "phi": lambda: phi(False),
    "phi, tied": lambda: phi(True),
    "bart": lambda: make_seq2seq("bart"),
    "marian": lambda: make_seq2seq("marian"),  # leaves a resized head to its tie
}


@pytest.mark.parametrize("more", [6, -6], ids=["grown", "shrunk"])
@pytest.mark.parametrize("make", RESIZED.values(), ids=RESIZED)
def test_the_dense_head_follows_a_resized_vocabulary(
    make: Callable[[], Any], more: int, tmp_path: Path
) -> None:
    """As in a model that was never patched, up to the noise of transformers' new rows."""
    model, plain = make(), make()
    vocab = model.config.vocab_size + more
    ids = torch.randint(3, vocab - 6, (2, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.flip(1)
    sh.patch(model, head=sh.heads.VQ(codes=16))
    for each in (model, plain):
        each.resize_token_embeddings(vocab)
    sh.unpatch(model)
    logits = model(**batch).logits
    torch.testing.assert_close(logits, plain(**batch).logits, atol=1e-3, rtol=1e-3)
    head = model.get_output_embeddings()
    assert head.out_features == len(head.weight) == vocab == model.config.vocab_size
    assert not head.training
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False),
        plain.generate(ids, max_new_tokens=4, do_sample=False),
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**batch).logits, logits)
