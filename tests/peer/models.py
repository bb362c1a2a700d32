"""Tiny configurations of four families for transformers' own common tests; collected inside their `tests` package."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin, ids_tensor

_KINDS = (
    modeling_auto.MODEL_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
)
_COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
    "gemma2": {**_COMMON, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {
        "vocab_size": 99,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


class Tester:
    """What the mixin asks of a `ModelTester`: sizes, a configuration and inputs."""

    is_training = True
    batch_size, seq_length = 2, 7
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    num_labels, type_sequence_label_size, num_choices = 3, 2, 4

    def __init__(self, parent: Any, family: str):
        self.parent, self.family = parent, family
        config = self.get_config()
        self.vocab_size, self.pad_token_id = config.vocab_size, 0
        self.encoder_seq_length = self.key_length = self.seq_length

    def get_config(self) -> Any:
        return AutoConfig.for_model(self.family, **FAMILIES[self.family])

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        ids[ids == self.pad_token_id] = 1
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


_GENERATES = not getattr(GenerationTesterMixin, "missing", False)  # see MISSING in run.py


class FamilyTests(*(ModelTesterMixin, GenerationTesterMixin)[: 1 + _GENERATES]):  # type: ignore[misc]
    family: str
    test_resize_embeddings = True
    has_attentions = True

    def setUp(self) -> None:
        self.model_tester = Tester(self, self.family)

    @property
    def is_encoder_decoder(self) -> bool:
        return False


def _tests(family: str) -> type:
    config = type(AutoConfig.for_model(family, **FAMILIES[family]))
    classes = tuple(kind[config] for kind in _KINDS if config in kind)
    generative = tuple(c for c in classes if c.__name__.endswith(("ForCausalLM", "LMHeadModel")))
    members = {
        "family": family,
        "all_model_classes": classes,
        "all_generative_model_classes": generative if _GENERATES else (),
    }
    return type(f"Test_{family}", (FamilyTests, unittest.TestCase), members)


Test_llama, Test_qwen3, Test_gemma2, Test_gpt2 = map(_tests, FAMILIES)
