"""choose: the budget is kept, the least loss wins, nothing is changed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from hf_softheads.heads import Dense, Quantized, TransformCoded
from hf_softheads.heads.base import HeadSpec
from hf_softheads.measure.choose import choose
from hf_softheads.registry import variants
from tests.conftest import make_model
from tests.heads.conftest import Toy, make_toy


@pytest.fixture(scope="module")
def case() -> tuple[Any, Toy]:
    toy = make_toy(256, 16, states=1024)
    model = make_model("llama", vocab_size=256, hidden_size=16, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(toy.weight)
    return model, dataclasses.replace(toy, stats=dataclasses.replace(toy.stats, tokens=10_000))


def test_default_candidates_keep_the_budget_and_are_ranked(
    case: tuple[Any, Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, toy = case
    few = {name: variants("head")[name] for name in ("dense", "low_rank", "quantized", "vq")}
    monkeypatch.setattr("hf_softheads.measure.choose.variants", lambda _: few)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    choice = choose(model, toy.stats, bits=5.0)
    assert all(t.bits <= 5.0 for t in choice.trials)
    assert choice.spec == choice.trials[0].spec
    losses = [t.kl for t in choice.trials]
    assert losses == sorted(losses)
    assert {t.spec.name for t in choice.trials} == {*few, "transform_coded"} - {"dense"}
    assert any(t.spec == TransformCoded(bits=5.0, rank=16) for t in choice.trials)
    assert str(choice.spec) in str(choice).splitlines()[1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.lm_head) is torch.nn.Linear


def test_measures_the_loss_by_definition(case: tuple[Any, Toy]) -> None:
    model, toy = case
    spec = Quantized(bits=3)
    trial = choose(model, toy.stats, bits=16.0, candidates=[Dense(), spec]).trials
    assert [t.spec for t in trial] == [Dense(), spec]
    assert trial[0].kl == pytest.approx(0, abs=1e-6)
    assert trial[0].agreement == 1
    assert trial[0].bits == 16
    head = spec.module(16, 256)
    rest = dataclasses.replace(toy.stats, states=toy.stats.states[256:])
    spec.fit(head, toy.weight, None, rest)
    states = toy.stats.states[:256]
    dense, mine = (states @ toy.weight.T).log_softmax(-1), head(states).log_softmax(-1)
    kl = float((dense.exp() * (dense - mine)).sum(-1).mean().detach())
    assert trial[1].kl == pytest.approx(kl, rel=1e-3)


def test_budget_in_bytes(case: tuple[Any, Toy]) -> None:
    model, toy = case
    specs: list[HeadSpec] = [Quantized(bits=4), Quantized(bits=8)]
    found = choose(model, toy.stats, nbytes=256 * 16 * 5 // 8, candidates=specs)
    assert [t.spec for t in found.trials] == [Quantized(bits=4)]


def test_refuses_a_budget_nothing_reaches(case: tuple[Any, Toy]) -> None:
    model, toy = case
    with pytest.raises(ValueError, match=r"no head fits into 0\.01 bits per weight; the smallest"):
        choose(model, toy.stats, bits=0.01)
    with pytest.raises(ValueError, match=r"\(9 bytes\); the smallest candidate takes .* bytes\)"):
        choose(model, toy.stats, nbytes=9)
    for budget in (0, math.nan, math.inf, "4"):
        with pytest.raises(ValueError, match="a budget is a finite number above 0, got"):
            choose(model, toy.stats, bits=budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [{}, {"bits": 4.0, "nbytes": 1000}])
def test_refuses_no_or_two_budgets(budget: dict[str, Any], case: tuple[Any, Toy]) -> None:
    model, toy = case
    with pytest.raises(ValueError, match="give one budget"):
        choose(model, toy.stats, **budget)


def test_refuses_statistics_of_another_model(case: tuple[Any, Toy]) -> None:
    with pytest.raises(ValueError, match="these statistics are of a model with hidden size 8"):
        choose(case[0], make_toy(256, 8, states=64).stats, bits=4.0)


def test_warns_of_too_few_tokens(case: tuple[Any, Toy]) -> None:
    model, toy = case
    few = dataclasses.replace(toy.stats, tokens=100)
    with pytest.warns(UserWarning, match=r"saw 100 tokens; .* they need about 8,192"):
        choose(model, few, bits=16.0, candidates=[Dense()])
