"""A learning rate that is larger than the numbers it moves: a warning, and rates that fit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_softheads as sh
from hf_softheads.heads import VQ, Dense, LowRank, Quantized, Screened, Temperature
from hf_softheads.heads.base import HeadSpec
from hf_softheads.training.rates import parameter_groups
from tests.conftest import make_model

WARNING = r"changed the weight of this QuantizedHead by \d+% of its size.*parameter_groups"
SMALL: dict[str, HeadSpec] = {
    "8 bits": Quantized(8),
    "groups": Quantized(8, group=16),
    "inside": Temperature(inner=Quantized(8)),
    "exact rows": Screened(LowRank(8), 24, inner=Quantized(8)),
}
USUAL: dict[str, HeadSpec] = {"dense": Dense(), "vq": VQ(24), "4 bits": Quantized(4)}


def small_rows() -> Any:
    """Rows as a trained model has them, not scaled up."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.div_(8)
    return model


def patched(spec: HeadSpec, tokens: Tensor) -> Any:
    model = small_rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = sh.collect(model, tokens, window=12)
        return sh.patch(model, head=spec, stats=stats).train()


def train(model: Any, optimizer: Any, tokens: Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_a_rate_larger_than_the_scales_warns_once(spec: HeadSpec, tokens: Tensor) -> None:
    model = patched(spec, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, tokens, 1)
    with pytest.warns(UserWarning, match=WARNING) as found:
        train(model, optimizer, tokens, 1)
    assert len(found) == 1
    train(model, optimizer, tokens, 4)
    with pytest.warns(UserWarning, match=WARNING):  # another model is another story
        train(other := patched(spec, tokens), torch.optim.AdamW(other.parameters()), tokens, 2)


def test_a_rate_that_rises_warns_when_it_is_too_large(tokens: Tensor) -> None:
    model = patched(Quantized(8), tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    train(model, optimizer, tokens, 8)
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.warns(UserWarning, match=WARNING):
        train(model, optimizer, tokens, 10)


@pytest.mark.parametrize("spec", USUAL.values(), ids=USUAL)
def test_usual_rates_of_other_heads_do_not_warn(spec: HeadSpec, tokens: Tensor) -> None:
    model = patched(spec, tokens)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), tokens, 5)


def test_what_is_no_step_does_not_warn(tokens: Tensor) -> None:
    """Gradients that are summed up over calls, a frozen head, SGD."""
    model = patched(Quantized(8), tokens)
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
    train(model, torch.optim.SGD(model.parameters(), lr=1e-9), tokens, 3)
    model.lm_head.requires_grad_(False)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), tokens, 3)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_rates_that_fit_the_scales(spec: HeadSpec, tokens: Tensor) -> None:
    model = patched(spec, tokens)
    groups = parameter_groups(model, 1e-3)
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))
    assert min(group["lr"] for group in groups) < 1e-4
    assert groups[0]["lr"] == 1e-3
    scales = next(p for group in groups[1:] for p in group["params"])
    before = scales.detach().clone()
    losses = train(model, torch.optim.AdamW(groups), tokens, 8)  # a warning would be an error
    assert losses[-1] < losses[0]
    assert 0.01 < ((scales - before).norm() / before.norm()).item() < 0.1


def test_what_is_frozen_is_in_no_group() -> None:
    model = sh.patch(small_rows(), head=Quantized(8))
    model.model.requires_grad_(False)
    (group,) = parameter_groups(model, 1e-3)
    assert group["params"] == [model.lm_head.weight]
    assert group["lr"] < 1e-4
