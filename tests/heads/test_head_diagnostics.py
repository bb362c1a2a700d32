"""The head's part of `diagnose`: rank, code usage and loss by frequency against plain definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

import hf_softheads as sh
from hf_softheads.measure.head_diagnostics import effective_rank
from tests.conftest import VOCAB, make_model


@pytest.fixture
def text() -> Tensor:
    return torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(2))


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7).double()) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0]).double()) == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rank_is_that_of_the_logits(family: str, text: Tensor) -> None:
    """A linear head is confined to D dimensions, a soft cap frees it."""
    found = sh.diagnose(make_model(family), text).head
    assert found is not None
    model = make_model(family)
    with torch.no_grad():
        logits = model(text).logits[:, :-1].flatten(0, 1).double()
    values = torch.linalg.svdvals(logits - logits.mean(-1, keepdim=True))
    got = torch.tensor(found.spectrum)
    assert (got - values / values[0]).abs().max() < 1e-5
    assert found.effective_rank == pytest.approx(effective_rank(values), rel=1e-3)
    assert (found.states, found.dim) == (60, 32)
    assert (found.rank == 32) if family == "llama" else (found.rank > 32)


def test_rank_in_bf16(text: Tensor) -> None:
    found = sh.diagnose(make_model("llama").bfloat16(), text).head
    assert found is not None
    assert found.rank == 32


def test_sigsoftmax_breaks_the_bottleneck(text: Tensor) -> None:
    model = make_model("llama")
    dense = sh.diagnose(model, text).head
    sh.patch(model, head=sh.heads.Sigsoftmax())
    bent = sh.diagnose(model, text).head
    assert dense is not None
    assert bent is not None
    assert bent.rank > dense.rank == 32


def test_loss_by_frequency(text: Tensor) -> None:
    model = make_model("llama")
    sh.patch(model, head=sh.heads.VQ(codes=8))
    found = sh.diagnose(model, text).head
    assert found is not None
    with torch.no_grad():
        loss = F.cross_entropy(model(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        sh.unpatch(model)
        dense = F.cross_entropy(model(text).logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    total = sum(b.tokens for b in found.bands)
    assert total == 60
    mine = sum(b.tokens * b.loss for b in found.bands if b.loss is not None) / total
    theirs = sum(b.tokens * b.dense_loss for b in found.bands if b.dense_loss is not None) / total
    assert mine == pytest.approx(float(loss), rel=1e-4)
    assert theirs == pytest.approx(float(dense), rel=1e-4)
    assert [(b.first, b.last) for b in found.bands] == [(1, 16), (17, 96)]
    assert found.bands[0].tokens >= 16 * found.bands[1].tokens / 80


def test_ranks_come_from_the_statistics(text: Tensor) -> None:
    model = make_model("llama")
    stats = sh.collect(model, torch.full((4, 16), 50))
    found = sh.diagnose(model, text, stats=stats).head
    assert found is not None
    rare = (stats.token_counts[text[:, 1:]] == 0).sum()
    assert rare == 60 - int((text[:, 1:] == 50).sum())
    assert found.bands[0].tokens < 60


def test_code_usage(text: Tensor) -> None:
    model = make_model("llama")
    assert sh.diagnose(model, text).head.codes is None  # type: ignore[union-attr]
    sh.patch(model, head=sh.heads.VQ(codes=8, init="contiguous"))
    found = sh.diagnose(model, text).head
    assert found is not None
    assert found.codes == 8
    assert found.unused_codes == 0
    share = torch.bincount(text[:, 1:].flatten() * 8 // VOCAB, minlength=8) / 60
    entropy = -sum(p * math.log(p) for p in share.tolist() if p)
    assert found.code_usage == pytest.approx(math.exp(entropy) / 8)
    assert "8 codes" in str(found)
    for spec in (sh.heads.ProductVQ(4, 16), sh.heads.ResidualVQ(2, 8)):
        sh.unpatch(model)
        sh.patch(model, head=spec)
        again = sh.diagnose(model, text).head
        assert again is not None
        assert again.codes == spec.codes
        assert 0 < again.code_usage <= 1  # type: ignore[operator]


def test_padding_does_not_count(text: Tensor) -> None:
    model = make_model("llama")
    padding = torch.zeros(4, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, text], 1),
        "attention_mask": torch.cat([padding, torch.ones_like(text)], 1),
        "position_ids": torch.cat([padding, torch.arange(16).expand(4, 16)], 1),
    }
    alone, again = sh.diagnose(model, text).head, sh.diagnose(model, padded).head
    assert alone is not None
    assert again is not None
    assert again.effective_rank == pytest.approx(alone.effective_rank, rel=1e-3)
    assert [b.tokens for b in again.bands] == [b.tokens for b in alone.bands]


def test_a_model_without_a_head(text: Tensor) -> None:
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    assert sh.diagnose(LlamaModel(config).eval(), text).head is None


def test_prints_and_dumps(text: Tensor) -> None:
    found = sh.diagnose(make_model("llama"), text)
    assert "effectively" in str(found)
    assert "frequency rank" in str(found)
    assert json.loads(found.to_json())["head"]["dim"] == 32
