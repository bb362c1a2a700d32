"""`log Σ exp` of all logits: every head's is that of its scores, and where a fit sets it, that of the dense head."""

from __future__ import annotations

import pytest
import torch

from hf_softheads.heads import LowRank, Quantized, Screened
from hf_softheads.heads.base import HeadSpec, LogitTransform
from tests.heads.conftest import Toy

TRANSFORMS = {
    "none": LogitTransform(),
    "scale": LogitTransform((("mul", 0.7),)),
    "soft cap": LogitTransform((("div", 8.0), ("tanh", 1.0), ("mul", 8.0))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "spec",
    [
        Screened(LowRank(3), candidates=8),
        Screened(LowRank(6), candidates=32, inner=Quantized(8)),
        Screened(Quantized(2), candidates=16),
    ],
    ids=["coarse", "fine", "rounded"],
)
def test_a_screened_head_has_the_dense_level(spec: HeadSpec, transform: str, toy: Toy) -> None:
    """On the states that it was calibrated with the mean differs by what Newton's method leaves."""
    head = spec.module(*toy.shape)
    head.transform = TRANSFORMS[transform]
    spec.fit(head, toy.weight, None, toy.stats)
    states = toy.stats.states
    dense = TRANSFORMS[transform](states @ toy.weight.T).logsumexp(-1).mean()
    with torch.no_grad():
        found = head.logsumexp(states).mean()
    assert float(found) == pytest.approx(float(dense), abs=1e-3)
