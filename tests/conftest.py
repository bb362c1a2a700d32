"""Tiny random models of every supported family, made in code, and options that play another machine."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_softheads import attention, classifiers, embeddings, heads, losses  # noqa: F401 - variants

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "head_dim": 8},
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "mistral": {**SIZES, "sliding_window": 8},
    "gemma2": {**SIZES, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**SIZES, "head_dim": 8, "sliding_window": 8},
    "phi3": {**SIZES, "num_key_value_heads": 4},
    "olmo2": SIZES,
    "granite": {**SIZES, "logits_scaling": 4.0},
    "cohere": {**SIZES, "logit_scale": 0.25},
    "gpt2": {**_GPT2, **_NO_DROPOUT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "gpt_neox": SIZES,
    "opt": {
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "do_layer_norm_before": True,
    },
}


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family in evaluation mode; its head is scaled up so that its distribution is peaked."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    return model


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


# -- options that play another machine -------------------------------------------------------------------------------

LOWERED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""What torch and its libraries read when they start, too early for a test to set: `make lowered` sets it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor",
        choices=["native", "avx2"],
        default="native",
        help="avx2: as on a processor without AVX-512, integer products and bf16 products",
    )
    parser.addoption("--no-compiler", action="store_true", help="as without a C++ compiler")


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected: some of them ask at import what there is."""
    if config.getoption("--processor") == "avx2":
        wrong = {k: os.environ.get(k) for k, v in LOWERED.items() if os.environ.get(k) != v}
        if wrong:
            needed = " ".join(f"{k}={v}" for k, v in LOWERED.items())
            raise pytest.UsageError(
                f"--processor=avx2 needs {needed} in the environment, found {wrong}; `make lowered` sets them"
            )
        folder = Path(__file__).parent / "as_avx2"
        runpy.run_path(str(folder / "sitecustomize.py"))
        paths = [str(folder), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["CXX"] = str(folder / "c++")
    if config.getoption("--no-compiler"):
        os.environ["CXX"] = "no-such-compiler"
