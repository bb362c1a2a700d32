"""What `patch` refuses, with the reason, before anything has changed; and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_softheads as sh
from hf_softheads import bridge
from hf_softheads.attention.engines import cpp
from hf_softheads.heads.forms import kernel_rows
from hf_softheads.kernels import KernelUnavailable
from hf_softheads.plan import dense_head

from .conftest import SIZES, VOCAB, make_model


@pytest.fixture
def model():
    return make_model("llama")


def refused(model, tokens, error, message, **arguments):
    before, state, kind = model(tokens).logits, copy.deepcopy(model.state_dict()), type(model)
    with pytest.raises(error, match=message):
        sh.patch(model, **arguments)
    assert type(model) is kind
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("codes", [VOCAB, VOCAB + 1])
def test_number_of_codes(model, tokens, codes):
    refused(model, tokens, ValueError, f"asked for {codes} codes", head=sh.heads.VQ(codes=codes))


def test_nothing_asked(model, tokens):
    refused(model, tokens, ValueError, "nothing to do")


@pytest.mark.parametrize("layer", [2, -3, 99])
def test_unknown_layer(model, tokens, layer):
    message = f"layer {layer} does not exist: the model has layers 0 to 1"
    refused(model, tokens, ValueError, message, attention="softmax", layers=[layer])


def test_empty_selection(model, tokens):
    refused(model, tokens, ValueError, "no layer selected", attention="softmax", layers=[])


def test_layers_without_attention(model, tokens):
    refused(model, tokens, ValueError, "needs attention=", head="dense", layers=[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, value):
    with torch.no_grad():
        model.lm_head.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"lm_head\.weight holds 1 NaN or infinite values"):
        sh.patch(model, head=sh.heads.VQ(codes=24))
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_statistics_of_another_model(model, tokens):
    other = make_model("llama", hidden_size=16, head_dim=4)
    stats = sh.collect(other, tokens, window=12)
    message = r"hidden size 16 and 96 tokens, the head has hidden size 32"
    refused(model, tokens, ValueError, message, head=sh.heads.VQ.repaired(24), stats=stats)


def test_repairs_without_statistics(model, tokens):
    refused(model, tokens, ValueError, "needs statistics", head=sh.heads.VQ.repaired(24))


def test_patching_twice(model, tokens):
    sh.patch(model, head=sh.heads.VQ(codes=24))
    refused(model, tokens, ValueError, "head is already patched", head=sh.heads.VQ(codes=12))
    sh.patch(model, attention="softmax")  # another part is another matter
    refused(model, tokens, ValueError, "attention is already patched", attention="ssmax")
    sh.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        sh.unpatch(model)


def test_a_loaded_model_cannot_be_unpatched(model, tmp_path):
    sh.patch(model, head=sh.heads.VQ(codes=24)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load the original"):
        sh.unpatch(loaded)
    with pytest.raises(ValueError, match="does not hold its dense head"):
        dense_head(loaded)


def test_a_loaded_model_gets_its_softmax_back(model, tokens, tmp_path):
    before = model(tokens).logits
    sh.patch(model, attention=sh.attention.Sigmoid()).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(loaded(tokens).logits, before)
    assert torch.equal(sh.unpatch(loaded)(tokens).logits, before)


def test_weights_that_are_not_there():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    with pytest.raises(ValueError, match="not in memory"):
        sh.patch(model, head=sh.heads.Dense())
    with pytest.raises(ValueError, match="not in memory"):
        sh.patch(model, attention="softmax")


def test_under_an_existing_adapter(model, tokens):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    before = adapted(input_ids=tokens).logits
    assert sh.patch(adapted, head="dense", attention="softmax") is adapted
    torch.testing.assert_close(adapted(input_ids=tokens).logits, before, atol=2e-5, rtol=1e-5)
    assert "dense" in str(sh.describe(adapted))
    torch.testing.assert_close(sh.unpatch(adapted)(input_ids=tokens).logits, before)


def test_something_that_is_no_model():
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        sh.patch(torch.nn.Linear(2, 2), head="dense")


def test_learned_sinks_would_be_lost():
    config = AutoConfig.for_model(
        "gpt_oss", **SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    kind = type(model)
    with pytest.raises(NotImplementedError, match="s_aux"):
        sh.patch(model, attention="softmax")
    assert type(model) is kind
    assert not any("softheads" in name for name, _ in model.named_modules())


def test_another_implementation_would_drop_the_variant(model, tokens):
    sh.patch(model, attention=sh.attention.Sigmoid())
    before = model(tokens).logits
    with pytest.raises(ValueError, match="unpatch"):
        model.set_attn_implementation("eager")
    assert torch.equal(model(tokens).logits, before)


def test_training_and_inference_modes_survive(model):
    model.train()
    model.model.layers[0].eval()
    sh.patch(model, head="dense", attention="softmax")
    assert model.training
    assert not model.model.layers[0].training
    assert model.lm_head.training


def test_frozen_heads_stay_frozen(model):
    model.requires_grad_(False)
    sh.patch(model, head=sh.heads.VQ(codes=24))
    assert not any(p.requires_grad for p in model.parameters())


def test_different_variants_in_different_layers(model, tokens):
    sh.patch(model, attention={0: "ssmax", -1: sh.attention.Sigmoid()})
    kinds = [layer.self_attn.softheads.spec.name for layer in model.model.layers]
    assert kinds == ["ssmax", "sigmoid"]
    text = str(sh.describe(model))
    assert "model.layers.0.self_attn" in text
    assert "sigmoid" in text


def test_describe_prints_the_floor(model, tokens):
    assert "not patched (2 attention layers could be)" in str(sh.describe(model))
    sh.patch(model, head=sh.heads.VQ(codes=24, init="contiguous"))
    assert "equally frequent: 4.00" in str(sh.describe(model))  # 96 tokens in 24 codes
    sh.unpatch(model)
    stats = sh.collect(model, tokens.repeat(4, 1), window=12)
    with pytest.warns(UserWarning, match="they need about 512"):
        sh.patch(model, head=sh.heads.VQ(codes=24), stats=stats)
    text = str(sh.describe(model))
    assert "vq(codes=24)" in text
    assert "25.00% of dense" in text
    assert "floor" in text


def test_an_encoder_s_attention(tokens):
    model = AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)).eval()
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    before = model(tokens, attention_mask=mask).last_hidden_state
    sh.patch(model, attention="softmax")
    after = model(tokens, attention_mask=mask).last_hidden_state
    visible = mask.bool()
    torch.testing.assert_close(after[visible], before[visible], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"head": sh.heads.VQ(codes=8)}, "head vq .* there is none for this variant"),
        ({"head": sh.heads.Quantized(4, group=16)}, "head quantized .* no compiler"),
        ({"attention": sh.attention.Softpick()}, "attention softpick .* no compiler"),
    ],
)
def test_a_required_kernel_that_is_missing(model, tokens, monkeypatch, arguments, reason):
    for module in (cpp, kernel_rows):
        monkeypatch.setattr(module, "why_not", lambda _: "no compiler")
    refused(model, tokens, KernelUnavailable, reason, kernels="require", **arguments)


def test_kernels_are_chosen_for_this_process_only(model, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'auto'"):
        sh.patch(model, head="dense", kernels="aut")
    sh.patch(model, head=sh.heads.Quantized(4), attention=sh.attention.SSMax(), kernels="off")
    assert str(sh.describe(model)).count("switched off") == 3
    model.save_pretrained(tmp_path)
    assert "kernels" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "switched off" not in str(sh.describe(loaded))


@pytest.mark.parametrize(
    "patches",
    [[{"head": "dense"}], [{"attention": "sigmoid"}, {"head": sh.heads.VQ(codes=24)}]],
    ids=["one", "two"],
)
def test_its_name_does_not_load_the_original(patches, tmp_path):
    """What reads a model's name to load it again fails; a name is given back, and a saved folder has its own."""
    make_model("llama").save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    for patch in patches:
        sh.patch(model, **patch)
    for name in (model.name_or_path, model.config.name_or_path):
        assert Path(name).is_dir()  # so that no model card takes it for a model on the Hub
        for kind in (AutoConfig, AutoModelForCausalLM):
            with pytest.raises(
                (OSError, ValueError), match="hf_softheads/assets/patched_in_memory"
            ):
                kind.from_pretrained(name)
    assert bridge.source(model) == str(tmp_path / "original")
    model.save_pretrained(tmp_path / "patched")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert again.name_or_path == again.config.name_or_path == str(tmp_path / "patched")
    sh.unpatch(model)
    assert model.name_or_path == model.config.name_or_path == str(tmp_path / "original")


def test_a_model_patched_while_loading_is_in_memory_too(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    plan = sh.SoftheadsConfig(head="dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=plan)
    assert "patched_in_memory" in model.config.name_or_path


def test_a_model_made_here_has_no_name(model):
    assert sh.patch(model, head="dense").name_or_path == ""


SMALLER_FOR_LARGER = {
    "dense": sh.heads.Dense(),
    "screened": sh.heads.Screened(sh.heads.LowRank(8), 12),
    "cascade": sh.heads.Cascade(sh.heads.LowRank(8), 12),
    "draft": sh.heads.Draft(24),
    "context_screen": sh.heads.ContextScreen(4, 12),
    "inside": sh.heads.Temperature(inner=sh.heads.Draft(24)),
}


@pytest.mark.parametrize("head", SMALLER_FOR_LARGER.values(), ids=SMALLER_FOR_LARGER)
@pytest.mark.parametrize(
    ("family", "scale"), [("cohere", {"logit_scale": -0.25}), ("granite", {"logits_scaling": -4.0})]
)
def test_a_family_that_makes_smaller_logits_of_larger_scores(family, scale, head, tokens):
    """Candidates would be the least likely tokens; with both signs turned it is the same model."""
    model = make_model(family, **scale, tie_word_embeddings=False)
    stats, logits = sh.collect(model, tokens, window=12), model(tokens).logits
    refused(
        model, tokens, ValueError, "makes smaller logits of larger scores", head=head, stats=stats
    )
    (name, value), *_ = scale.items()
    turned = make_model(family, **{name: -value}, tie_word_embeddings=False)
    with torch.no_grad():
        turned.get_output_embeddings().weight.neg_()
    assert torch.equal(turned(tokens).logits, logits)
    sh.patch(turned, head=head, stats=stats)


def test_a_saved_folder_whose_scale_was_turned(tmp_path):
    sh.patch(make_model("cohere"), head=sh.heads.VQ(codes=24)).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"logit_scale": 0.25', '"logit_scale": -0.25'))
    with pytest.raises(ValueError, match="makes smaller logits of larger scores"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
