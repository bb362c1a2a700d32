"""The forms for flex_attention, run on a CPU in eager mode, against the query blocks. No GPU is involved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

import hf_softheads.attention as sa
from hf_softheads.attention import base, flex, fused, native
from hf_softheads.attention.base import AttentionSpec, Inputs
from tests.attention.samples import SPECS, Sample, label, left_padded, sample
from tests.attention.test_contract import close

FORMS = [s for s in SPECS if flex.has_form(s)]
pytestmark = [  # torch's own: eager mode is slow; a look at `.grad` of what is no leaf
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


@pytest.fixture
def on_flex(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """Every call that flex_attention can express runs on it; torch's refusal of gradients on a CPU is lifted."""
    calls: list[Inputs] = []

    def possible(inputs: Inputs) -> bool:
        calls.append(inputs)
        return flex.expressible(inputs)

    monkeypatch.setattr(flex, "possible", possible)
    monkeypatch.setattr(native, "possible", lambda *_: False)
    monkeypatch.setattr(fused, "possible", lambda _: False)
    monkeypatch.setattr(fused, "sinks_possible", lambda _: False)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(base.blocked, "attend", lambda *_: pytest.fail("ran in blocks"))
    return calls


def test_which_variants_have_a_form() -> None:
    names = {s.name for s in FORMS}
    assert names >= {"softmax", "learned_sink", "softmax1", "sigmoid", "swat", "ssmax", "log_n"}
    assert names >= {"selective", "elu", "relu", "rectified", "stablemax", "lssa"}
    assert not names & {"softpick", "sparsemax", "entmax", "entmax15", "top_k", "lssar", "identity"}
    assert not flex.has_form(sa.Sigmoid(row_bias="lse"))


def cases(spec: AttentionSpec) -> dict[str, Sample]:
    found = {"left padding": sample(spec, queries=20, dim=16, keep=left_padded([20, 13], 20))}
    if spec.name == "softmax":
        found["causal"] = sample(spec, queries=20, dim=16)
        found["after a prefix"] = sample(spec, queries=9, keys=20, dim=16)
    return found


OWN = [s for s in FORMS if s._overrides("weights") or s == sa.Softmax()]  # the others share one


@pytest.mark.parametrize("spec", OWN, ids=label)
def test_forward_and_backward(spec: AttentionSpec, request: pytest.FixtureRequest) -> None:
    grad = torch.randn(2, 4, 20, 16, generator=torch.Generator().manual_seed(1))

    def run(arguments: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        arguments = arguments.requires_grad()
        out = arguments()
        return out, arguments.grads(out, grad[:, :, : out.shape[2]])

    want = {name: run(arguments) for name, arguments in cases(spec).items()}
    request.getfixturevalue("on_flex")
    for name, arguments in cases(spec).items():
        out, grads = run(arguments)
        close(f"{name}: out", out, want[name][0], 1e-5)
        for leaf, value in grads.items():
            close(f"{name}: d{leaf}", value, want[name][1][leaf], 2e-5)


@pytest.mark.parametrize("spec", [sa.Softmax(), sa.LearnedSink(), sa.SWAT(window=6)], ids=label)
def test_soft_caps_biases_windows_and_packed_rows(
    spec: AttentionSpec, request: pytest.FixtureRequest
) -> None:
    arguments = sample(spec, queries=40, dim=16)
    part = torch.tensor([0] * 15 + [1] * 25)
    packed = (part[:, None] == part) & torch.ones(40, 40, dtype=torch.bool).tril()
    bias = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(2))
    inputs = Inputs(arguments.query, arguments.key, arguments.value, None, 0.25)
    calls = [
        inputs.but(softcap=0.7),
        inputs.but(bias=bias),
        inputs.but(window=5),
        inputs.but(keep=packed[None, None], window=5, bias=bias, softcap=2.0),
        inputs.but(keep=torch.ones(1, 1, 40, 40, dtype=torch.bool), causal=False),
    ]
    want = [base.run(spec, arguments.params, call) for call in calls]
    request.getfixturevalue("on_flex")
    for call, wanted in zip(calls, want, strict=True):
        close("out", base.run(spec, arguments.params, call), wanted, 1e-5)


def test_bfloat16_is_as_good_as_the_blocks(request: pytest.FixtureRequest) -> None:
    arguments = sample(sa.Sigmoid(bias=-2.0), queries=40, dim=16, dtype=torch.bfloat16)
    exact = arguments.to(torch.float64)()
    request.getfixturevalue("on_flex")
    out = arguments()
    assert out.dtype == torch.bfloat16
    close("out", out, exact, 2**-6)


def test_calls_that_stay_in_blocks() -> None:
    arguments = sample(sa.Sigmoid(), queries=4, dim=16)
    inputs = Inputs(arguments.query, arguments.key, arguments.value, None, 0.25)
    assert flex.expressible(inputs)
    assert not flex.possible(inputs)  # a CPU
    for changed in (
        inputs.but(query=arguments.query[:, :, :1]),
        inputs.but(query=arguments.query[..., :8], key=arguments.key[..., :8]),
        inputs.but(dropout=0.1),
        inputs.but(observe=lambda *_: None),
        inputs.but(value=arguments.value.double()),
        inputs.but(bias=torch.zeros(4, 4, requires_grad=True)),
    ):
        assert not flex.expressible(changed)


def test_paths_are_told() -> None:
    assert flex.path(sa.Softmax()).startswith("scaled_dot_product_attention")
    assert flex.path(sa.SSMax()).startswith("scaled_dot_product_attention")
    assert flex.path(sa.Sigmoid()).startswith("flex_attention")
    assert "cannot express" in flex.path(sa.Softpick())
    assert flex.has_form(replace(sa.SWAT(), window=3))
