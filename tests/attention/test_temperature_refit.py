"""The long polynomial of `adaptive_temperature` is what the paper's procedure gives."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_softheads.attention as sa
from tests.attention.samples import sample

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "adaptive_temperature.py"))


def test_the_shipped_line_is_the_fit_of_the_measured_points(script: dict[str, Any]) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "adaptive_temperature.json").read_text())
    spec = sa.AdaptiveTemperature.refit()
    assert list(spec.long) == found["polynomial"] == script["fit"](found["points"])
    assert spec.long_from == found["joint"] == script["JOINT"]
    flattest = found["points"][-1]
    assert flattest["entropy"] > 9
    assert flattest["loss_at_1"] - flattest["loss"] < script["WORTH"]


def test_it_goes_on_where_the_published_one_stops() -> None:
    refit, published = sa.AdaptiveTemperature.refit(), sa.AdaptiveTemperature()
    low = torch.linspace(0, 4.39, 50)
    assert torch.equal(refit.factor(low), published.factor(low))
    joint = torch.tensor([4.3999, 4.4001])
    assert (refit.factor(joint)[0] - refit.factor(joint)[1]).abs() < 1e-2
    beyond = torch.tensor([5.95, 7.0])
    assert torch.equal(published.factor(beyond), torch.ones(2))
    assert (refit.factor(beyond) > 1.2).all()
    assert torch.equal(refit.factor(torch.tensor([7.7, 9.0, 11.1])), torch.ones(3))


def test_flat_rows_become_sharper() -> None:
    """1,500 keys with scores that spread them over more than 5.95 nats."""
    arguments = sample(sa.Softmax(), batch=1, heads=1, kv_heads=1, queries=1, keys=1500, scale=1.2)
    scores = (arguments.query @ arguments.key.mT) * 8**-0.5
    keep = torch.ones_like(scores, dtype=torch.bool)

    def entropy(spec: Any) -> float:
        return float(torch.special.entr(spec.weights(scores, keep, {})).sum())

    plain = entropy(sa.Softmax())
    assert plain > 5.95
    assert entropy(sa.AdaptiveTemperature()) == pytest.approx(plain, abs=1e-4)
    assert entropy(sa.AdaptiveTemperature.refit()) < plain - 0.3


@pytest.mark.slow
def test_a_coarse_measurement_agrees(script: dict[str, Any]) -> None:
    """Another head, trained a quarter as long, on fewer rows, finds the β of the results file within a quarter."""
    found = json.loads((ROOT / "benchmarks" / "results" / "adaptive_temperature.json").read_text())
    head = script["trained"](7, 600)
    points = script["best_by_entropy"](*script["measure"](head, 7, [2**8, 2**10], 2**17))
    inside = [p for p in points if 1.0 < p["entropy"] < 3.0]
    assert len(inside) >= 3
    for point in inside:
        stored = min(found["points"], key=lambda p: abs(p["entropy"] - point["entropy"]))
        assert point["beta"] == pytest.approx(stored["beta"], rel=0.25)
        assert point["loss_at_1"] - point["loss"] > 0.1
