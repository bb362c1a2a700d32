"""Wrong input: one clear error that says what was asked and what would work, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_softheads.attention as sa
from hf_softheads.attention.base import attend
from hf_softheads.registry import spec_from_dict
from tests.attention.samples import sample


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sa.TopK(k=0), "k must be at least 1, got 0"),
        (lambda: sa.Entmax(alpha=1.0), "alpha must be greater than 1"),
        (lambda: sa.Entmax(alpha=0.5), "alpha must be greater than 1"),
        (lambda: sa.Entmax(alpha=2.0, learn=True), "starts below 2"),
        (lambda: sa.SWAT(window=-1), "window must be at least 1, got -1"),
        (lambda: sa.SWAT(window=0), "window must be at least 1"),
        (lambda: sa.SWAT(alibi=True), "slopes of its own"),
        (lambda: sa.LogN(length=1), "at least 2"),
        (lambda: sa.SSMax(reference_length=1), "at least 2"),
        (lambda: sa.ReLU(power=3), "power must be one of 1, 2"),
        (lambda: sa.ReLU(divide="length", length=0), "length must be at least 1"),
        (lambda: sa.LSSAR(p=-1), "p must be positive"),
        (lambda: sa.Selective(width=0), "width must be at least 1"),
        (lambda: sa.Mixed(other=sa.Mixed()), "two gates"),
        (lambda: sa.AdaptiveTemperature(polynomial=()), "at least one coefficient"),
        (lambda: spec_from_dict("attention", "softpik"), "did you mean 'softpick'"),
        (lambda: spec_from_dict("attention", {"name": "top_k", "kk": 3}), "no field 'kk'"),
        (
            lambda: spec_from_dict("attention", {"name": "relu", "divide": "m"}),
            "must be one of 'n', 'length', 'none'",
        ),
        (lambda: sa.SWAT().slopes_of(3), "even number of heads"),
    ],
)
def test_hyper_parameters(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_mask_is_boolean() -> None:
    inputs = sample(sa.Sigmoid())
    additive = torch.zeros(11, 11)
    with pytest.raises(TypeError, match=r"boolean mask .*float32.*finfo"):
        inputs(keep=additive)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": torch.ones(3, 1, 11, 11, dtype=torch.bool)}, r"does not broadcast to .*2, 4, 11"),
        ({"keep": torch.ones(11, 9, dtype=torch.bool)}, "does not broadcast"),
        ({"keep": torch.ones(1, 1, 1, 11, 11, dtype=torch.bool)}, "does not broadcast"),
        ({"key": torch.zeros(2, 3, 11, 8), "value": torch.zeros(2, 3, 11, 8)}, "multiple"),
        ({"value": torch.zeros(2, 2, 9, 8)}, "key and value differ"),
        ({"key": torch.zeros(2, 2, 11, 6)}, "batch or head dimension"),
        ({"key": torch.zeros(2, 11, 8)}, "expected"),
        ({"key": torch.zeros(2, 2, 7, 8), "value": torch.zeros(2, 2, 7, 8)}, "cannot be causal"),
    ],
)
@pytest.mark.parametrize("spec", [sa.Softmax(), sa.Softpick()], ids=["softmax", "softpick"])
def test_shapes(spec: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(spec)(**changes)


def test_parameters() -> None:
    q = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"ssmax has the parameters s, got sinks"):
        attend(sa.SSMax(), q, q, q, params={"sinks": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"ssmax has the parameters s, got none"):
        attend(sa.SSMax(), q, q, q, params={})
    with pytest.raises(ValueError, match="reads the layer's input"):
        attend(sa.Gated(), q, q, q)


def test_tempered_values_refuse_a_cache() -> None:
    inputs = sample(sa.Selective(values=True))
    with pytest.raises(ValueError, match="use_cache=False"):
        inputs(query=inputs.query[:, :, :2], hidden=inputs.hidden[:, :2])
