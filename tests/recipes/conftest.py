"""A tiny model folder with a tokenizer of its own, and the recipes as modules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_model

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

VOCAB = 384
WORDS = ["def", "class", "return", "import", "self", "value", "None", "for", "while", "if", "print"]


def text(count: int, seed: int) -> str:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(WORDS), (count,), generator=g).tolist()
    return " ".join(WORDS[i] + (".\n" if n % 11 == 10 else "") for n, i in enumerate(ids))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` (a Llama of 20 k parameters), `train.txt`, `held.txt`, `train.jsonl`."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "train.txt").write_text(text(6000, 0))
    (root / "held.txt").write_text(text(600, 1))
    documents = [json.dumps({"text": text(200, 10 + i), "id": i}) for i in range(30)]
    (root / "train.jsonl").write_text("\n".join(documents))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(6000, 0)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    fast.save_pretrained(root / "model")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    model = make_model("llama", tie_word_embeddings=False, **sizes)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    model.save_pretrained(root / "model")
    return root


@pytest.fixture
def experiment(folder: Path) -> dict[str, Any]:
    """A head repair of six steps."""
    return {
        "name": "experiment",
        "model": str(folder / "model"),
        "head": {"name": "vq", "codes": 40},
        "data": str(folder / "train.txt"),
        "eval_data": str(folder / "held.txt"),
        "steps": 6,
        "batch": 4,
        "window": 32,
        "lr": 1e-2,
        "eval_every": 3,
        "eval_tokens": 256,
        "checkpoint_every": 2,
        "calibration_tokens": 512,
        "precision": "fp32",
    }


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Any:
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
