"""A patch in every supported family: the control changes nothing, a real one saves, loads, trains and generates."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_softheads as sh
from hf_softheads.bridge import SplitModel
from hf_softheads.heads.base import LogitTransform

from .conftest import VOCAB, make_model

TRANSFORMS = {
    "gemma2": (("div", 30.0), ("tanh", 1.0), ("mul", 30.0)),
    "granite": (("div", 4.0),),
    "cohere": (("mul", 0.25),),
}


def test_control_changes_nothing(family, tokens):
    model = make_model(family)
    before, state = model(tokens).logits, copy.deepcopy(model.state_dict())
    sh.patch(model, head=sh.heads.Dense(), attention=sh.attention.Softmax())
    torch.testing.assert_close(model(tokens).logits, before, atol=2e-5, rtol=1e-5)
    assert model.get_output_embeddings().transform == LogitTransform(TRANSFORMS.get(family, ()))
    sh.unpatch(model)
    assert torch.equal(model(tokens).logits, before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_head_gives_the_model_s_distribution(family, tokens):
    """`log_prob` of the head, soft caps and scales included, is that of `model(...).logits`."""
    model = sh.patch(make_model(family), head=sh.heads.VQ(codes=24))
    reader = SplitModel(model)
    hidden = reader.hidden(input_ids=tokens)[:, :-1]
    with torch.no_grad():
        wanted = model(tokens).logits[:, :-1].float().log_softmax(-1)
        wanted = wanted.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        found = reader.head.log_prob(hidden, tokens[:, 1:])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_save_and_load_is_bit_exact_twice(family, tokens, tmp_path):
    model = sh.patch(make_model(family), head=sh.heads.VQ(codes=24), attention=sh.attention.SSMax())
    wanted = model(tokens).logits
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / turn)
        assert torch.equal(model(tokens).logits, wanted)
        assert not hasattr(model, "hf_quantizer")
        assert not getattr(model, "is_quantized", False)
        assert not model.config.tie_word_embeddings
        assert type(model).__name__ == model.config.architectures[0]
        # what the family does to its logits is not in the file: the loaded head must find it again
        assert model.get_output_embeddings().transform == LogitTransform(TRANSFORMS.get(family, ()))


def test_training_loss_inside_the_head(family, tokens):
    """With labels in training mode the loss and gradients are those of the logits, which are never made."""
    model = sh.patch(make_model(family), head=sh.heads.VQ(codes=24))
    labels = tokens.clone()
    labels[0, :5] = -100
    plain = model(tokens, labels=labels)
    plain.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    fused = model(tokens, labels=labels)
    assert fused.logits is None
    fused.loss.backward()
    torch.testing.assert_close(fused.loss, plain.loss, atol=2e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], atol=2e-5, rtol=1e-4, msg=name)
    model.eval()
    assert model(tokens, labels=labels).logits.shape == (2, 12, VOCAB)


def test_accumulated_gradients_are_those_of_the_whole_batch(family, tokens):
    """`num_items_in_batch` divides the loss inside the head, as it divides the one of logits."""
    model = sh.patch(make_model(family), head=sh.heads.VQ(codes=24)).train()
    labels = tokens.clone()
    labels[0, :5] = -100  # the parts have unequal numbers of labels
    items = int((labels[:, 1:] != -100).sum())
    whole = model(tokens, labels=labels).loss
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for count in (items, torch.tensor(items)):
        model.zero_grad()
        parts = [
            model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count)
            for i in range(2)
        ]
        assert all(part.logits is None for part in parts)
        for part in parts:
            part.loss.backward()
        torch.testing.assert_close(sum(part.loss for part in parts), whole, atol=2e-5, rtol=1e-5)
        for name, p in model.named_parameters():
            if name in wanted:
                torch.testing.assert_close(p.grad, wanted[name], atol=2e-5, rtol=1e-4, msg=name)


def test_labels_that_are_shifted_already(tokens):
    """As a trainer that splits sequences gives them: the token after each position, whatever `labels` say."""
    model = sh.patch(make_model("llama"), head=sh.heads.VQ(codes=24)).train()
    after = torch.randint(3, VOCAB, tokens.shape, generator=torch.Generator().manual_seed(4))
    after[1, -3:] = -100
    with torch.no_grad():
        loss = model(tokens, labels=tokens, shift_labels=after).loss
        logits = model.eval()(tokens).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), after.flatten())
    torch.testing.assert_close(loss, wanted, atol=2e-5, rtol=1e-5)


def test_generates(family, tokens):
    """Greedy decoding with a cache, left-padded beside unpadded."""
    model = sh.patch(make_model(family), head=sh.heads.VQ(codes=24), attention=sh.attention.LogN())
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens[:1, :6]], 1)
    mask = (padded != 0).long()
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": VOCAB + 1,
        "pad_token_id": 0,
    }
    alone = model.generate(tokens[:1, :6], attention_mask=mask[:, 4:], **options)
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(alone[:, 6:], together[:, 10:])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tied_embeddings_are_untied(family, tokens, tmp_path):
    model = make_model(family, tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.clone()
    sh.patch(model, head=sh.heads.VQ(codes=24))
    model.tie_weights()  # must not put the embedding back into the head
    assert model.get_output_embeddings().weight.shape[0] == 24
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, embedding)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    sh.unpatch(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("falcon", {}),
        ("bloom", {}),
        ("gptj", {"rotary_dim": 4, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
        ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    ],
)
def test_families_with_an_attention_of_their_own_are_refused(family, options, tokens):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **{**sizes, **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model(tokens).logits
    with pytest.raises(ValueError, match=r"attention"):
        sh.patch(model, attention=sh.attention.Softmax())
    assert torch.equal(model(tokens).logits, before)
    sh.patch(model, head=sh.heads.Dense())  # the head of such a family can be replaced
    torch.testing.assert_close(model(tokens).logits, before)


def test_a_model_without_a_head_is_refused():
    model = AutoModel.from_config(
        AutoConfig.for_model(
            "llama",
            **{"vocab_size": VOCAB, "hidden_size": 32}
            | {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48},
        )
    )
    with pytest.raises(ValueError, match="no output embedding"):
        sh.patch(model, head=sh.heads.Dense())
