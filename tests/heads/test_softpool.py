"""Pooled classifiers: they start as the trained one, see no padding, train, save, load and come off again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import hf_softheads as sh
from hf_softheads.classifiers import SoftPool
from hf_softheads.classifiers.softpool import PooledClassifier
from hf_softheads.heads import VQ

LABELS, VOCAB, DIM = 3, 40, 16
SMALL = {"vocab_size": VOCAB, "num_labels": LABELS, "pad_token_id": 0}
ENCODER = {
    "hidden_size": DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**ENCODER, "num_key_value_heads": 1},
    "gpt2": {"n_embd": DIM, "n_layer": 1, "n_head": 2, "n_positions": 40},
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": {"dim": DIM, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
    "modernbert": ENCODER,
}


def model(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    return AutoModelForSequenceClassification.from_config(config).eval()


def text(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def padded(tokens: torch.Tensor, count: int, side: str) -> dict[str, torch.Tensor]:
    """The second row is `count` tokens shorter, filled up on one side."""
    tokens, mask = tokens.clone(), torch.ones_like(tokens)
    where = slice(0, count) if side == "left" else slice(tokens.shape[1] - count, None)
    if side == "left":
        tokens[1, count:] = tokens[1, :-count].clone()
    tokens[1, where], mask[1, where] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def shaken(patched: Any) -> Any:
    """With new parameters that are not where they started."""
    generator = torch.Generator().manual_seed(3)
    for part in patched.modules():
        if isinstance(part, PooledClassifier):
            for p in (part.query, part.sharpness, part.weight):
                p.data = torch.randn(p.shape, generator=generator).to(p)
    return patched


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_trained_classifier_and_trains(family: str) -> None:
    plain = model(family)
    batch = padded(text(), 3, "right")
    before = plain(**batch).logits
    patched = sh.patch(plain, head=SoftPool(heads=2))
    torch.testing.assert_close(patched(**batch).logits, before, rtol=0, atol=0)
    assert "softpool(heads=2)" in str(sh.describe(patched))
    changed = shaken(copy.deepcopy(patched))(**batch).logits
    assert (changed - before).abs().max() > 1e-2

    own = [p for n, p in patched.named_parameters() if n.endswith((".query", ".weight", "ness"))]
    optimizer = torch.optim.Adam(own, lr=0.05)
    losses = []
    for _ in range(30):
        loss = patched(**batch, labels=torch.tensor([1, 2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]

    sh.unpatch(patched)
    assert not any(isinstance(m, PooledClassifier) for m in patched.modules())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_is_not_pooled(family: str) -> None:
    patched = shaken(sh.patch(model(family), head=SoftPool()))
    tokens = text()
    alone = patched(input_ids=tokens[1:, :6]).logits
    for side in ("right", "left") if family == "llama" else ("right",):
        batch = padded(tokens, 3, side)
        if side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        torch.testing.assert_close(patched(**batch).logits[1:], alone, rtol=1e-4, atol=1e-5)
    if family == "llama":  # without a mask the padding token tells
        found = patched(input_ids=padded(tokens, 3, "right")["input_ids"]).logits[1:]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_pools_by_formula() -> None:
    part = SoftPool(heads=2).module(4, 3, torch.nn.Identity())
    torch.manual_seed(0)
    for p in part.parameters():
        torch.nn.init.normal_(p)
    h = torch.randn(1, 5, 4)
    wanted = []
    for d in range(4):
        score = h[0] @ part.query[d // 2] / 2 + part.sharpness[d] * h[0, :, d]
        wanted.append((score.softmax(0) * h[0, :, d]).sum())
    found = part.pool(h, torch.ones(1, 5, dtype=torch.bool))[0]
    torch.testing.assert_close(found, torch.stack(wanted))
    assert not part.pool(h, torch.zeros(1, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_saves_and_loads_as_any_classifier(family: str, tmp_path: Path) -> None:
    batch = padded(text(), 3, "right")
    patched = shaken(sh.patch(model(family), head=SoftPool(heads=4), attention="identity"))
    patched.save_pretrained(tmp_path / "a")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(loaded(**batch).logits, patched(**batch).logits)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a", dtype="bfloat16")
    assert half(**batch).logits.dtype == torch.bfloat16
    torch.testing.assert_close(
        half(**batch).logits.float(), patched(**batch).logits, rtol=0.1, atol=0.1
    )
    model(family).save_pretrained(tmp_path / "b")
    fresh = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "b", quantization_config=sh.SoftheadsConfig(head="softpool")
    )
    torch.testing.assert_close(fresh(**batch).logits, model(family)(**batch).logits)


def test_peft_trains_a_copy_of_it() -> None:
    patched = sh.patch(model("llama"), head=SoftPool())
    wrapped = get_peft_model(
        patched, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    )
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert any("modules_to_save" in n and n.endswith("query") for n in trained)
    batch = padded(text(), 3, "right")
    before = wrapped(**batch).logits
    shaken(wrapped)
    assert (wrapped(**batch).logits - before).abs().max() > 1e-2
    wrapped(**batch, labels=torch.tensor([0, 1])).loss.backward()


def test_wrong_uses_say_what_would_work() -> None:
    with pytest.raises(ValueError, match=r"3 heads, which do not divide .* size 16; 2 would"):
        sh.patch(model("llama"), head=SoftPool(heads=3))
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, **FAMILIES["llama"])
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        sh.patch(AutoModelForCausalLM.from_config(config), head=SoftPool())
    with pytest.raises(ValueError, match="no output embedding"):
        sh.patch(model("llama"), head=VQ(codes=4))
    with pytest.raises(ValueError, match="unknown head variant 'softpol'"):
        sh.patch(model("llama"), head="softpol")
    with pytest.raises(RuntimeError, match="call the model"):
        sh.patch(model("llama"), head=SoftPool()).score(torch.randn(1, 2, DIM))
