"""A new site is one file: here an activation, defined by the contract of `sites/base.py` and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_softheads as sh
from hf_softheads import sites
from hf_softheads.registry import Spec
from hf_softheads.sites.base import Fitting, Part, Row, Site

from .conftest import make_model


@dataclass(frozen=True)
class ActivationSpec(Spec, kind="activation"):
    """What a perceptron does between its matrices."""


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x) * self.weight


@dataclass(frozen=True)
class TestSites(ActivationSpec, name="test_sites"):  # a variant is called after its file
    __test__ = False
    slope: float = 2.0


class Activation(Site):
    slot = "activation"
    kind = "activation"
    order = 40

    def build(self, model: PreTrainedModel, part: Part) -> list[Slope]:
        return [Slope() for _ in model.model.layers]

    def prepare(self, model: PreTrainedModel, part: Part, fitting: Fitting) -> list[Slope]:
        new = self.build(model, part)
        for module in new:
            nn.init.constant_(module.weight, part.value.slope)
        return new

    def present(self, model: PreTrainedModel) -> Any:
        return [layer.mlp.act_fn for layer in model.model.layers]

    def install(self, model: PreTrainedModel, new: list[Slope]) -> None:
        for layer, module in zip(model.model.layers, new, strict=True):
            layer.mlp.act_fn = module

    restore = install

    def probe(self, model: PreTrainedModel, new: list[Slope]) -> None:
        if any(module.weight < 0 for module in new):
            raise ValueError("the slope is negative")

    def describe(self, model: PreTrainedModel, part: Part) -> tuple[Iterable[Row], list[str]]:
        return [Row("act_fn", part.value.short(), "2", 8, "torch")], ["slopes of all layers"]


@pytest.fixture
def activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "SITES", (*sites.SITES, Activation()))


@pytest.mark.usefixtures("activation")
def test_a_new_site_patches_saves_loads_describes_and_unpatches(
    tokens: Tensor, tmp_path: Path
) -> None:
    model = make_model("llama")
    before = model(tokens).logits
    sh.patch(model, head=sh.heads.VQ(codes=24), activation=TestSites(slope=3.0))
    text = str(sh.describe(model))
    assert "test_sites(slope=3.0)" in text
    assert "slopes of all layers" in text
    assert "vq(codes=24)" in text
    model.save_pretrained(tmp_path)
    after = model(tokens).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.activation == TestSites(slope=3.0)
    assert torch.equal(loaded(tokens).logits, after)
    assert torch.equal(sh.unpatch(model)(tokens).logits, before)


@pytest.mark.usefixtures("activation")
def test_a_site_whose_probe_fails_leaves_the_model_as_it_was(tokens: Tensor) -> None:
    model = make_model("llama")
    before, kind = model(tokens).logits, type(model)
    with pytest.raises(ValueError, match="slope is negative"):
        sh.patch(model, head="dense", activation=TestSites(slope=-1.0))
    assert type(model) is kind
    assert torch.equal(model(tokens).logits, before)


def test_an_unknown_slot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no argument 'activatio'.*valid: attention"):
        sh.patch(make_model("llama"), activatio="relu")
    with pytest.raises(ValueError, match="no argument 'inner'"):
        sh.patch(make_model("llama"), head="dense", inner={})
