"""A patched model for every head variant, small enough for two cores; and tokenizers of one word a token."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_softheads as sh
from hf_softheads.heads.base import HeadSpec
from hf_softheads.registry import variants
from tests.conftest import SIZES, VOCAB, make_model

HEADS = sorted(variants("head"))
WIDTH: int = SIZES["hidden_size"]


@functools.cache
def spec_of(name: str) -> HeadSpec:
    """A middle-sized setting of a head variant."""
    if name == "sdm":
        return sh.heads.SDM(exemplars=32)  # its ladder asks for more hidden states than a toy has
    ladder = variants("head")[name].ladder(WIDTH, VOCAB)
    return ladder[len(ladder) // 2]


@functools.cache
def _stats() -> Any:
    tokens = torch.randint(3, VOCAB, (24, 24), generator=torch.Generator().manual_seed(2))
    return sh.collect(make_model("llama"), tokens, window=12)


@functools.cache
def _fitted(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fits of a toy warn about its few tokens
        return sh.patch(make_model("llama"), head=spec_of(name), stats=_stats())


def patched(name: str) -> Any:
    """A random llama with the head variant `name`, fitted with statistics; a copy of its own for each caller."""
    return copy.deepcopy(_fitted(name))


def as_dense(model: Any) -> Any:
    """The untouched model with the dense matrix that a linear head stands for."""
    dense = make_model("llama")
    with torch.no_grad():
        dense.lm_head.weight.copy_(model.lm_head(torch.eye(WIDTH)).T)
    return dense


def tokenizer(vocab: int = VOCAB, seed: int | None = None) -> PreTrainedTokenizerFast:
    """One token a word, `w0 w1 …`; with a seed the words have their tokens in another order."""
    words = list(range(vocab - 3))
    if seed is not None:
        words = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{word}": 3 + i for i, word in enumerate(words)}}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",
    )
