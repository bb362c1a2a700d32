"""Assisted generation: a patched target, a patched assistant, and an assistant with another tokenizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import _PruneReindexingLMHead

import hf_softheads as sh
from hf_softheads.heads.base import Head
from tests.clients.samples import HEADS, WIDTH, patched, tokenizer
from tests.conftest import make_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
ASSISTANTS = [sh.heads.VQ(codes=24), sh.heads.Quantized(4), sh.heads.Dense()]


@pytest.mark.client(
    "assisted generation", works="under every head the tokens are those of greedy search"
)
@pytest.mark.parametrize("name", HEADS)
def test_a_patched_target_and_a_patched_assistant(name, tokens):
    target, assistant = patched(name), patched("vq")
    expected = target.generate(tokens[:1], **GREEDY)
    assisted = target.generate(tokens[:1], assistant_model=assistant, **GREEDY)
    assert torch.equal(assisted, expected)


@pytest.mark.client("assisted generation", works="patched attention in both models")
def test_patched_attention(tokens):
    target, assistant = (
        sh.patch(make_model("llama", seed), head="dense", attention="ssmax") for seed in (0, 1)
    )
    expected = target.generate(tokens[:1], **GREEDY)
    assert torch.equal(target.generate(tokens[:1], assistant_model=assistant, **GREEDY), expected)


@pytest.mark.client(
    "assisted generation",
    works="greedy, with an assistant of another tokenizer (universal assisted decoding)",
)
@pytest.mark.parametrize("spec", ASSISTANTS, ids=lambda spec: spec.name)
def test_an_assistant_with_another_tokenizer(spec):
    target = patched("vq")
    assistant = sh.patch(make_model("llama", 1, vocab_size=100), head=spec)
    own, other = tokenizer(), tokenizer(100, seed=1)
    prompt = own("w5 w9 w20 w31 w7", return_tensors="pt").input_ids
    found = target.generate(
        prompt, assistant_model=assistant, tokenizer=own, assistant_tokenizer=other, **GREEDY
    )
    assert torch.equal(found, target.generate(prompt, **GREEDY))


def pruned(head: Head, hidden: Tensor, kept: Tensor) -> Tensor:
    """What transformers makes of an assistant's head when tokenizers differ and tokens are sampled."""
    return _PruneReindexingLMHead(head, kept)(hidden)


@pytest.mark.client(
    "assisted generation",
    works="sampling with an assistant of another tokenizer, which prunes its head: `dense` only",
)
def test_a_dense_head_is_pruned():
    head = patched("dense").lm_head
    hidden = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(4))
    kept = torch.arange(3, 90, 4)
    torch.testing.assert_close(pruned(head, hidden, kept), head(hidden)[:, kept])


@pytest.mark.client(
    "assisted generation",
    refused="sampling with an assistant of another tokenizer that has any other head",
    why="transformers cuts rows out of `lm_head.weight`, which is not the matrix of the logits; greedy search works",
)
@pytest.mark.parametrize("name", sorted(set(HEADS) - {"dense"}))
def test_any_other_head_refuses_to_be_pruned(name):
    message = r"transformers\.pytorch_utils reads .* `weight` .* of a head that hf_softheads put in"
    with pytest.raises(ValueError, match=message):
        pruned(patched(name).lm_head, torch.zeros(5, WIDTH), torch.arange(3))
