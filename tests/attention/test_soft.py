"""SOFT: the authors' numbers, its landmarks, encoders, and why causal models cannot have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

import hf_softheads as sh
from hf_softheads.attention.base import attend
from tests.attention.test_contract import close
from tests.attention.test_golden import case
from tests.attention.test_models import _SIZES
from tests.conftest import make_model

sa = sh.attention


def test_the_authors_kernel() -> None:
    want, every = case("soft", "full"), torch.ones(16, 16, dtype=torch.bool)
    out = attend(sa.Soft(), want["q"], want["q"], want["v"], every, scaling=1.0, causal=False)
    close("out", out, want["out"], 1e-5)


def test_landmarks_near_the_kernel() -> None:
    """The more, the nearer, for queries that change slowly; padding is in none of them."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 64, 8, generator=generator, dtype=torch.float64).cumsum(2) / 8
    value = torch.randn(1, 2, 64, 8, generator=generator, dtype=torch.float64)
    every = torch.ones(64, 64, dtype=torch.bool)

    def out(landmarks: int) -> Tensor:
        return attend(sa.Soft(landmarks=landmarks), query, query, value, every, causal=False)

    errors = [float((out(n) - out(64)).norm()) for n in (4, 16, 48)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * float(out(64).norm())
    keep = every.clone()
    keep[:, 40:] = False
    spoiled = query.clone()
    spoiled[:, :, 40:] += 5
    options = {"keep": keep, "causal": False}
    first = attend(sa.Soft(landmarks=8), query, query, value, **options)
    close(
        "padding",
        attend(sa.Soft(landmarks=8), spoiled, query, value, **options)[:, :, :40],
        first[:, :, :40],
        1e-12,
    )


def test_causal_models_are_refused_with_the_reason(tokens: Tensor) -> None:
    model = make_model("llama")
    before = model(tokens).logits
    with pytest.raises(
        ValueError, match=r"for encoders: its landmarks are means over the whole text"
    ):
        sh.patch(model, attention=sa.Soft())
    assert torch.equal(model(tokens).logits, before)


def test_encoders(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("bert", **_SIZES)).eval()
    sh.patch(model, attention=sa.Soft(landmarks=4))
    mask = torch.ones_like(tokens)
    mask[:, 9:] = 0
    with torch.no_grad():
        padded = model(tokens, attention_mask=mask).last_hidden_state[:, :9]
        alone = model(tokens[:, :9], attention_mask=mask[:, :9]).last_hidden_state
    close("padded", padded, alone, 1e-5)
