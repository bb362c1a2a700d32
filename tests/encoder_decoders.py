"""Tiny encoder–decoder models, made in code."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

VOCAB = 64
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "tie_word_embeddings": True,
}
_SWITCH = {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "bart": _BART,
    "mbart": _BART,
    "marian": _BART,
    "pegasus": _BART,
    "pegasus_x": _BART,
    "m2m_100": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "plbart": _BART,
    "mvp": _BART,
    "bigbird_pegasus": _BART,
    "led": {
        **_BART,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": 4,
    },
    "nllb-moe": {**_BART, "num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,  # scales what the head sees where the embeddings are tied
    "longt5": _T5,
    "switch_transformers": _SWITCH,
}


def make_seq2seq(family: str, **changes: Any) -> Any:
    """A random model in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SEQ2SEQ[family], **changes})
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def pairs() -> dict[str, torch.Tensor]:
    """Two sequences and what the decoder has read of their answers."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 16), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
