"""A new head leaves its own tie only: encoder and decoder keep sharing their embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_softheads as sh
from hf_softheads import bridge

from .conftest import VOCAB, make_model
from .encoder_decoders import SEQ2SEQ, make_seq2seq, pairs
from .encoder_decoders import VOCAB as SMALL


def shared(model: Any) -> bool:
    """Do encoder, decoder and the model itself read one matrix?"""
    inputs = model.get_input_embeddings().weight
    sides = (model.get_encoder(), model.get_decoder())
    return all(side.get_input_embeddings().weight is inputs for side in sides)


@pytest.mark.parametrize("family", sorted(SEQ2SEQ))
def test_an_encoder_and_its_decoder_stay_tied(family: str, tmp_path: Any) -> None:
    model, batch = make_seq2seq(family), pairs()
    assert shared(model)
    wanted = model(**batch).logits
    sh.patch(model, head=sh.heads.Dense(), tie=False)
    assert torch.equal(model(**batch).logits, wanted)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert shared(again)
    assert torch.equal(again(**batch).logits, wanted)
    again.tie_weights()
    assert shared(again)
    assert torch.equal(again(**batch).logits, wanted)  # the head keeps its own matrix
    again.resize_token_embeddings(SMALL + 6)
    assert shared(again)
    grown = again(**batch).logits
    assert grown.shape[-1] == SMALL + 6
    torch.testing.assert_close(grown[..., :SMALL], wanted)
    sh.unpatch(model)
    assert shared(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["bart", "t5", "marian"])
def test_shards_keep_the_ties(family: str, tmp_path: Any) -> None:
    model, batch = make_seq2seq(family), pairs()
    sh.patch(model, head=sh.heads.VQ(codes=16), tie=False)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert shared(again)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "twice")
    assert shared(twice)
    assert torch.equal(twice(**batch).logits, model(**batch).logits)


def test_embeddings_that_were_never_tied_stay_apart(tmp_path: Any) -> None:
    model, batch = make_seq2seq("bart", tie_word_embeddings=False), pairs()
    wanted = model(**batch).logits
    sh.patch(model, head=sh.heads.Dense(), tie=False).save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert not shared(again)
    assert torch.equal(again(**batch).logits, wanted)
    assert not again.get_output_embeddings().untied


def test_two_vocabularies_stay_two(tmp_path: Any) -> None:
    """Marian may have a vocabulary of its own in the decoder: only the head is tied there."""
    options = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 48}
    model, batch = make_seq2seq("marian", **options), pairs()
    batch["decoder_input_ids"] = batch["decoder_input_ids"] % 48
    wanted = model(**batch).logits
    sh.patch(model, head=sh.heads.Dense(), tie=False).save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings  # the head's tie was the only one
    assert torch.equal(again(**batch).logits, wanted)
    again.resize_token_embeddings(SMALL + 6)  # the encoder's
    assert again(**batch).logits.shape[-1] == 48


def test_the_matrix_may_be_the_head_s(tokens: Tensor, tmp_path: Any) -> None:
    """Where a family ties its embedding to the head and not the other way round, the embedding keeps its numbers."""
    model = make_model("llama", tie_word_embeddings=True)
    model._tied_weights_keys = {"model.embed_tokens.weight": "lm_head.weight"}
    model.all_tied_weights_keys = dict(model._tied_weights_keys)
    wanted = model(tokens).logits
    sh.patch(model, head=sh.heads.Dense(), tie=False)
    assert model.all_tied_weights_keys == {}
    assert model._tied_weights_keys == {}
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, wanted)
    sh.unpatch(model)
    assert model._tied_weights_keys == {"model.embed_tokens.weight": "lm_head.weight"}


def test_what_was_tied_through_the_head_stays_one() -> None:
    model = sh.patch(
        make_model("llama", tie_word_embeddings=True), head=sh.heads.Dense(), tie=False
    )
    ties = {"a.weight": "lm_head.weight", "b.weight": "lm_head.weight", "c.bias": "d.bias"}
    assert bridge.without_heads(model, ties) == {"b.weight": "a.weight", "c.bias": "d.bias"}


def test_a_masked_model_s_bias(tokens: Tensor, tmp_path: Any) -> None:
    """BERT ties the bias of its head too."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", vocab_size=VOCAB, num_hidden_layers=1, **sizes)
    config.is_decoder = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    wanted = model(tokens).logits
    sh.patch(model, head=sh.heads.Dense(), tie=False).save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, wanted)
    sh.unpatch(model)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize("spec", [sh.heads.Dense(), sh.heads.VQ(codes=16)], ids=lambda s: s.name)
def test_a_table_that_the_family_sets_with_the_head(spec: Any, tmp_path: Any) -> None:
    """T5Gemma gives its decoder's embedding the `weight` of whatever becomes its head."""
    side = {
        "vocab_size": SMALL,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5gemma", encoder=side, decoder=side, vocab_size=SMALL)
    model, batch = AutoModelForSeq2SeqLM.from_config(config).eval(), pairs()
    table, wanted = model.get_decoder().embed_tokens.weight, model(**batch).logits
    sh.patch(model, head=spec, tie=False)
    assert model.get_decoder().embed_tokens.weight is table
    found = model(**batch).logits
    assert spec.name != "dense" or torch.equal(found, wanted)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, found)
    sh.unpatch(model)
    assert torch.equal(model(**batch).logits, wanted)
    assert model.get_decoder().embed_tokens.weight is model.get_output_embeddings().weight
