"""The forms for flex_attention, run on a CPU in eager mode, against the query blocks. No GPU is involved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

import hf_softheads.attention as sa
from hf_softheads.attention import base
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Call, Geometry, Inputs
from hf_softheads.attention.engines import cpp, flex, query_blocks, sdpa
from tests.attention.samples import SPECS, Sample, label, left_padded, sample
from tests.attention.test_contract import close


def has_form(spec: AttentionSpec) -> bool:
    query = torch.zeros(1, 2, 2, 16)
    params = spec.init_params(Geometry(heads=2, kv_heads=2, head_dim=16, hidden_size=16))
    inputs = Inputs(query, query, query, None, 1.0)
    return not isinstance(spec, sa.Mixed) and spec.score_form(inputs, params) is not None


FORMS = [s for s in SPECS if has_form(s)]
pytestmark = [  # torch's own: eager mode is slow; a look at `.grad` of what is no leaf
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
]


@pytest.fixture
def on_flex(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """Every call that flex_attention can express runs on it; torch's refusal of gradients on a CPU is lifted."""
    calls: list[Inputs] = []

    def supports(call: Call) -> str | None:
        calls.append(call.inputs)
        return flex.inexpressible(call)

    monkeypatch.setattr(flex, "supports", supports)
    monkeypatch.setattr(cpp, "supports", lambda _: "not here")
    monkeypatch.setattr(sdpa, "supports", lambda _: "not here")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(query_blocks, "attend", lambda *_: pytest.fail("ran in blocks"))
    return calls


def test_which_variants_have_a_form() -> None:
    names = {s.name for s in FORMS}
    assert names >= {"softmax", "learned_sink", "softmax1", "sigmoid", "swat", "ssmax", "log_n"}
    assert names >= {"selective", "elu", "relu", "rectified", "stablemax", "lssa"}
    assert not names & {"softpick", "sparsemax", "entmax", "entmax15", "top_k", "lssar", "identity"}
    assert not has_form(sa.Sigmoid(row_bias="lse"))


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
    arguments = sample(spec, queries=20, dim=16)
    part = torch.tensor([0] * 8 + [1] * 12)
    packed = (part[:, None] == part) & torch.ones(20, 20, dtype=torch.bool).tril()
    bias = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(2))
    inputs = Inputs(arguments.query, arguments.key, arguments.value, None, 0.25)
    calls = [
        inputs.replace(softcap=0.7),
        inputs.replace(bias=bias),
        inputs.replace(window=5),
        inputs.replace(keep=packed[None, None], window=5, bias=bias, softcap=2.0),
        inputs.replace(keep=torch.ones(1, 1, 20, 20, dtype=torch.bool), causal=False),
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

    def call(inputs: Inputs) -> Call:
        return Call(sa.Sigmoid(), inputs, {})

    assert flex.inexpressible(call(inputs)) is None
    assert flex.supports(call(inputs)) == "it is for accelerators"
    for changed, reason in (
        (inputs.replace(query=arguments.query[:, :, :1]), "a single query"),
        (inputs.replace(query=arguments.query[..., :8], key=arguments.key[..., :8]), "smaller"),
        (inputs.replace(dropout=0.1), "no dropout"),
        (inputs.replace(observe=lambda *_: None), "shows no weights"),
        (inputs.replace(value=arguments.value.double()), "fp32"),
        (inputs.replace(bias=torch.zeros(4, 4, requires_grad=True)), "gradient of a bias"),
    ):
        assert reason in str(flex.inexpressible(call(changed)))
    assert "more than one pass" in str(flex.inexpressible(Call(sa.Softpick(), inputs, {})))
