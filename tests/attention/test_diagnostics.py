"""Sink rates, entropy and sparsity against the authors' numbers and plain definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hf_softheads as sh
from hf_softheads.attention.base import Inputs
from hf_softheads.attention.engines.query_blocks import Block
from hf_softheads.cli import main
from hf_softheads.measure.diagnostics import Tally, hidden_state_facts, sink_rate
from tests.attention.samples import sample
from tests.conftest import make_model

sa = sh.attention
GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "sail_sink_variants.safetensors")


def tally(maps: Tensor, keep: Tensor, renormalise: bool, step: int = 7) -> Any:
    """One layer's map `(B, H, T, T)` in blocks, as a model shows it."""
    counter = Tally(renormalise)
    states = torch.zeros(*maps.shape[:3], 1)
    inputs = Inputs(states, states, states, None, 1.0)
    for first in range(0, maps.shape[2], step):
        rows = slice(first, min(first + step, maps.shape[2]))
        last = rows.stop  # causal: later keys are hidden from the whole block
        block = Block(slice(0, len(maps)), rows, slice(0, last))
        counter.observe(inputs, block, maps[:, :, rows, :last], keep[..., rows, :last])
    return counter.result()


def test_sink_rate_of_the_authors() -> None:
    attention = GOLDEN["metric.attn"]  # (S, L, H, T, T)
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    alpha = torch.stack([tally(m, causal, True).alpha for m in attention.unbind(1)], 1)
    wanted = GOLDEN["metric_eps0.3.rate_percent"].double()
    assert (sink_rate(alpha, 0.3) - wanted).abs().max() <= 1e-3
    assert wanted.max() > 0


def test_sparsity_and_first_column_of_softpick() -> None:
    maps = GOLDEN["metric_softpick.sparse_map"]  # (S, H, T, T)
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    found = tally(maps, causal, False)
    elements, nonzero = (int(GOLDEN[f"metric_softpick.{n}"]) for n in ("elements", "nonzero"))
    assert elements == maps.shape[0] * maps.shape[1] * 32 * 33 // 2
    assert round(float((1 - found.near_zeros).mean()) * elements) == nonzero
    rate = float((found.first_column > 0.3).double().mean())
    assert abs(rate - float(GOLDEN["metric_softpick.sink_rate"])) <= 1e-6
    exact = (maps == 0)[..., causal].double().mean((0, 2))
    assert (found.zeros - exact).abs().max() <= 1e-12


def test_entropy_is_the_matrix_free_one() -> None:
    """`H = lse - scale · q · Attn(q, K, V := K)` needs no weights."""
    s = sample(sa.Softmax(), heads=2, kv_heads=2, dtype=torch.float64)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    scores = (s.query @ s.key.mT * 8**-0.5).masked_fill(~causal, -torch.inf)
    found = tally(scores.softmax(-1), causal, True)
    entropy = scores.logsumexp(-1) - 8**-0.5 * (s.query * s(value=s.key)).sum(-1)
    assert (found.entropy - entropy.mean((0, 2))).abs().max() <= 1e-12
    relative = entropy[:, :, 1:] / torch.arange(2, 12).log()
    assert (found.relative_entropy - relative.mean((0, 2))).abs().max() <= 1e-12
    first = (scores[..., 0] - scores.logsumexp(-1)).exp().mean(2)
    assert (found.alpha[..., 0] - first).abs().max() <= 1e-12


def test_rows_are_renormalised_only_when_asked() -> None:
    torch.manual_seed(0)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    maps = torch.rand(2, 3, 9, 9) * causal * 0.1
    raw, shares = tally(maps, causal, False), tally(maps, causal, True)
    assert (raw.alpha[..., 0] - maps[..., 0].mean(2)).abs().max() <= 1e-8
    wanted = (maps / maps.sum(-1, keepdim=True))[..., 0].mean(2)
    assert (shares.alpha[..., 0] - wanted).abs().max() <= 1e-7
    assert torch.equal(raw.row_sum, shares.row_sum)


def test_hidden_states() -> None:
    torch.manual_seed(0)
    states = torch.randn(500, 400)
    states[3, 7] = -1000.0
    largest, median, _ = hidden_state_facts(states)
    assert largest[0] == 1000.0
    assert abs(median - 0.6745) < 0.01
    assert abs(hidden_state_facts(torch.randn(500, 400))[2] - 3) < 0.05


@pytest.mark.parametrize("spec", [None, sa.Softpick(), sa.Sigmoid(bias=-3.0), sa.SWAT(window=6)])
def test_padding_and_patches(spec: Any, tokens: Tensor) -> None:
    """Left-padded rows are counted as if they were alone; the model is left as it was."""
    model = make_model("llama")
    if spec is not None:
        sh.patch(model, attention=spec)
    before = model(tokens).logits
    implementation = model.config._attn_implementation
    alone = sh.diagnose(model, tokens)
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, tokens], 1),
        "attention_mask": torch.cat([padding, torch.ones_like(tokens)], 1),
        "position_ids": torch.cat([padding, torch.arange(12).expand(2, 12)], 1),
    }
    again = sh.diagnose(model, padded)
    assert again.tokens == alone.tokens == 24
    for name in ("first_key", "entropy", "relative_entropy", "zeros", "row_sum", "kurtosis"):
        got, want = torch.tensor(getattr(again, name)), torch.tensor(getattr(alone, name))
        assert (got - want).abs().max() <= 1e-4 * max(1, float(want.abs().max())), name
    assert again.first_column_rate == alone.first_column_rate
    assert torch.equal(model(tokens).logits, before)
    assert model.config._attn_implementation == implementation
    assert alone.variants == ["softmax" if spec is None else spec.name] * 2


def test_numbers_make_sense(tokens: Tensor) -> None:
    model = make_model("gemma2")  # windows and soft caps
    found = sh.diagnose(model, tokens)
    assert all(abs(s - 1) < 1e-5 for layer in found.row_sum for s in layer)
    assert all(0 < e <= math.log(12) for layer in found.entropy for e in layer)
    assert len(found.largest) == len(found.kurtosis) == 3
    assert json.loads(found.to_json())["sink_rate"] == found.sink_rate
    assert "sink rate" in str(found)
    sh.patch(model, attention=sa.Mixed(start=1.0, other=sa.Softpick()))
    mixed = sh.diagnose(model, tokens)
    sh.unpatch(model)
    sh.patch(model, attention=sa.Softpick())
    other = sh.diagnose(model, tokens)
    assert (torch.tensor(mixed.entropy) - torch.tensor(other.entropy)).abs().max() < 1e-4
    assert (torch.tensor(mixed.zeros) - torch.tensor(other.zeros)).abs().max() < 1e-6


def test_plots(tokens: Tensor, tmp_path: Path) -> None:
    files = sh.diagnose(make_model("llama"), tokens).plot(tmp_path)
    assert [f.name for f in files] == ["attention.png", "hidden_states.png", "head.png"]
    assert all(f.stat().st_size > 5000 for f in files)


def test_refusals(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        sh.diagnose(make_model("llama"), tokens[:, :1])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n\n" * 50)
    small = ["--window", "32", "--rows", "2", "--plot", str(tmp_path / "plots"), "--json"]
    assert main(["diagnose", "embedded", "--data", str(tmp_path / "text.txt"), *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 64
    assert (tmp_path / "plots" / "attention.png").is_file()
