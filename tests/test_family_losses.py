"""A patched model's training loss is the one that its family computes: additions, keywords, and labels as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

import hf_softheads as sh
from hf_softheads.training.objective import Objective

from .conftest import SIZES, VOCAB, make_model
from .encoder_decoders import SEQ2SEQ, make_seq2seq, pairs

_MOE = {**SIZES, "output_router_logits": True, "num_hidden_layers": 1}
ROUTED: dict[str, dict[str, Any]] = {
    "mixtral": {**_MOE, "num_local_experts": 4, "router_aux_loss_coef": 1.0},
    "qwen3_moe": {
        **_MOE,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "router_aux_loss_coef": 0.5,
    },
    "gpt_oss": {
        **_MOE,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 1.0,
    },
    "granitemoe": {**_MOE, "num_local_experts": 4, "router_aux_loss_coef": 1.0},
    "jetmoe": {
        **_MOE,
        "num_local_experts": 4,
        "kv_channels": 8,
        "num_key_value_heads": 4,
        "aux_loss_coef": 1.0,
    },
}


def routed(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **ROUTED[family])
    return AutoModelForCausalLM.from_config(config).train()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model: Any, found: Tensor, wanted: Tensor) -> None:
    """Loss and gradients."""
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    wanted_gradients = gradients(model, wanted)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("family", sorted(ROUTED))
def test_the_balance_of_a_router_stays_in_the_loss(
    family: str, patched: bool, tokens: Tensor
) -> None:
    model = routed(family)
    plain = model(input_ids=tokens, labels=tokens)
    alone = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(plain.loss - alone) > 0.1  # there is something to lose
    wanted, want = plain.loss.detach(), gradients(model, plain.loss)
    if patched:
        sh.patch(model, head=sh.heads.Dense())
        torch.testing.assert_close(model(input_ids=tokens, labels=tokens).loss, wanted)
    goal = Objective(model, {sh.losses.CrossEntropy(): 1.0})
    torch.testing.assert_close(goal(input_ids=tokens, labels=tokens), wanted)
    each = goal(input_ids=tokens, labels=tokens, reduction="none")  # of tokens: the router has none
    torch.testing.assert_close(each.mean(), alone)
    trainer = sh.trainer_loss(model)
    output = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(output.loss, wanted)
    assert output.get("logits") is None
    assert output.aux_loss is not None
    found = gradients(model, output.loss)
    router = [name for name in want if "router" in name or "gate" in name]
    assert router
    for name in router:
        torch.testing.assert_close(found[name], want[name], atol=2e-5, rtol=1e-4)
    as_tuple = model(input_ids=tokens, labels=tokens, return_dict=False)
    torch.testing.assert_close(as_tuple[0], wanted)
    trainer.remove()
    again = model.eval()(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(again.loss, wanted)
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize("way", ["head", "objective"])
@pytest.mark.parametrize("variant", [sh.heads.Dense(), sh.heads.VQ(codes=24)], ids=["dense", "vq"])
def test_keywords_of_the_loss_are_honoured(variant: Any, way: str, tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), head=variant)
    padded = tokens.clone()
    padded[:, 8:] = 0
    other = tokens.flip(1).clone()
    other[0, -3:] = -100
    calls: list[dict[str, Any]] = [
        {"labels": padded, "ignore_index": 0},
        {"labels": tokens, "shift_labels": other},
        {"labels": padded, "ignore_index": 0, "num_items_in_batch": 5},
        {"labels": tokens, "num_items_in_batch": torch.tensor(7)},
    ]
    for call in calls:
        wanted = model.eval()(tokens, **call).loss
        if way == "objective":
            found = Objective(model.train(), {"cross_entropy": 1.0})(input_ids=tokens, **call)
        else:
            output = model.train()(tokens, **call)
            assert output.get("logits") is None
            found = output.loss
        same(model, found, wanted)


def test_a_loss_function_of_the_user_is_computed_from_logits(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama").train(), head=sh.heads.VQ(codes=24))

    def smoothed(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
        )

    model.loss_function = smoothed
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, smoothed(output.logits, tokens, VOCAB))


@pytest.mark.parametrize("family", sorted(SEQ2SEQ))
@pytest.mark.parametrize("inputs", ["labels", "labels and decoder_input_ids"])
def test_an_encoder_decoder_trains_on_its_own_loss(family: str, inputs: str) -> None:
    model, batch = make_seq2seq(family), pairs()
    labels = batch["input_ids"].roll(1, 1)
    labels[0, -4:] = -100
    if inputs == "labels":
        del batch["decoder_input_ids"]
    wanted = model(**batch, labels=labels).loss.detach()
    sh.patch(model, head=sh.heads.Dense())
    model.training = True  # and no module in it: nothing drops out
    loss = model(**batch, labels=labels).loss
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("variant", [sh.heads.Dense(), sh.heads.VQ(codes=16)], ids=["dense", "vq"])
def test_an_objective_of_an_encoder_decoder_does_not_shift(family: str, variant: Any) -> None:
    model, batch = make_seq2seq(family), pairs()
    labels = batch["input_ids"].roll(1, 1)
    labels[0, -4:] = -100
    del batch["decoder_input_ids"]
    sh.patch(model, head=variant)
    wanted = model(**batch, labels=labels).loss
    goal = Objective(model, {"cross_entropy": 1.0})
    each = goal(**batch, labels=labels, reduction="none")
    assert each.shape == labels.shape
    torch.testing.assert_close(each.sum() / (labels != -100).sum(), wanted)
    same(model, goal(**batch, labels=labels), wanted)
    wanted = model(**batch, labels=labels).loss
    trainer = sh.trainer_loss(model)
    model.training = True
    same(model, model(**batch, labels=labels).loss, wanted)
    trainer.remove()


def test_a_loss_that_cannot_be_kept_is_refused() -> None:
    """Switch adds its router's losses in a forward that computes its cross-entropy itself."""
    model, batch = make_seq2seq("switch_transformers", router_aux_loss_coef=1.0), pairs()
    ids = batch["input_ids"]
    call = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    with pytest.raises(ValueError, match="computes its loss itself and adds"):
        Objective(model, {"cross_entropy": 1.0})(**call)
    wanted = model(**call).loss
    sh.patch(model, head=sh.heads.Dense())  # the loss inside the head falls back to logits
    model.training = True
    torch.testing.assert_close(model(**call).loss, wanted)


def whisper() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "whisper",
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=20,
        max_target_positions=20,
        num_mel_bins=8,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=3,
        dropout=0.0,
    )
    return AutoModelForSpeechSeq2Seq.from_config(config).eval()


def speech_to_text() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "speech_to_text",
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_conv_layers=2,
        conv_kernel_sizes=(3, 3),
        conv_channels=16,
        input_feat_per_channel=8,
        max_source_positions=40,
        max_target_positions=20,
        dropout=0.0,
    )
    return AutoModelForSpeechSeq2Seq.from_config(config).eval()


@pytest.mark.parametrize("make", [whisper, speech_to_text])
def test_speech_models_train_on_their_own_loss(make: Any, tmp_path: Any) -> None:
    model = make()
    shape = (2, 8, 40) if make is whisper else (2, 40, 8)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_features": torch.randn(shape, generator=generator),
        "labels": torch.randint(3, 64, (2, 10), generator=generator),
    }
    batch["labels"][0, -3:] = -100
    plain = model(**batch).loss
    sh.patch(model, head=sh.heads.Dense())
    wanted = model(**batch).loss
    torch.testing.assert_close(wanted, plain)
    model.training = True
    same(model, model(**batch).loss, wanted)
    trainer = sh.trainer_loss(model)
    torch.testing.assert_close(model(**batch).loss, wanted)
    trainer.remove()
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).loss, wanted)
