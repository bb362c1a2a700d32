"""The authors' own numbers: outputs, gradients and weights of every row map, from their code or their formula."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hf_softheads.attention as sa
from hf_softheads.attention.base import AttentionSpec, Geometry, attend
from hf_softheads.attention.selective import Selective

GOLDEN = Path(__file__).parent.parent / "golden"
FORWARD, GRADIENT = 1e-5, 2e-5


@cache
def golden(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{file}.safetensors")


def case(file: str, name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in golden(file).items() if k.startswith(prefix)}


CASES: list[tuple[str, str, AttentionSpec, dict[str, Any]]] = [
    ("adaptive_temperature", "base", sa.AdaptiveTemperature(), {}),
    ("adaptive_temperature", "flat", sa.AdaptiveTemperature(), {}),
    ("entmax15", "base", sa.Entmax15(), {}),
    ("entmax15", "base", sa.Entmax(alpha=1.5), {}),
    ("entmax_bisect_1.25", "base", sa.Entmax(alpha=1.25), {}),
    ("lssa_lssar", "lssa", sa.LSSA(), {}),
    ("lssa_lssar", "lssar3", sa.LSSAR(p=3), {}),
    ("lssa_lssar", "lssar15", sa.LSSAR(), {"gradient": 2e-4}),
    ("rectified_softmax", "base", sa.Rectified(), {}),
    ("relu_topk_derived", "relu.base", sa.ReLU(divide="none"), {}),
    ("relu_topk_derived", "relu_over_n.base", sa.ReLU(), {}),
    ("relu_topk_derived", "relu_over_L.base", sa.ReLU(divide="length", length=17), {}),
    ("relu_topk_derived", "relu2_over_n.base", sa.ReLU(power=2), {}),
    ("relu_topk_derived", "topk4.base", sa.TopK(k=4), {}),
    ("sa_softmax", "norm", sa.SASoftmax(), {}),
    ("sa_softmax", "nodeno", sa.SASoftmax(normalised=False), {}),
    ("sail_sink_variants", "sim_sigmoid_norm.base", sa.Sigmoid(divide="sum"), {}),
    ("sail_sink_variants", "sim_sigmoid_nonorm.base", sa.Sigmoid(), {"weights": "own"}),
    ("sail_sink_variants", "sim_elu_norm.base", sa.ELU(), {}),
    ("sail_sink_variants", "sim_elu_nonorm.base", sa.ELU(normalised=False), {"weights": "own"}),
    ("sail_sink_variants", "kernel_elu_norm.base", sa.ELU(features=True), {"weights": "own"}),
    (
        "sail_sink_variants",
        "kernel_elu_nonorm.base",
        sa.ELU(features=True, normalised=False),
        {"forward": 2e-5, "weights": "own"},
    ),
    ("sail_sink_variants", "kernel_linear_norm.base", sa.Identity(), {"weights": "own"}),
    (
        "sail_sink_variants",
        "kernel_linear_nonorm.base",
        sa.Identity(normalised=False),
        {"weights": "own"},
    ),
    ("sigmoid", "b0", sa.Sigmoid(), {}),
    ("sigmoid", "blogn", sa.Sigmoid(bias=-2.833213), {}),
    ("sigmoid", "seq_len_normalized_sigmoid_attention", sa.Sigmoid(divide="n"), {}),
    ("sink_gptoss", "sinks.base", sa.LearnedSink(), {"trained": ["sinks"]}),
    ("sink_gptoss", "softmax1.base", sa.Softmax1(), {}),
    ("softpick", "base", sa.Softpick(), {}),
    ("sparsemax", "base", sa.Sparsemax(), {}),
    ("sparsemax", "base", sa.Entmax(alpha=2.0), {}),
    ("ssa_position_temperature", "expexp.base", sa.Selective(), {"trained": ["beta"]}),
    (
        "ssa_position_temperature",
        "nofunc.base",
        sa.Selective(position="linear"),
        {"trained": ["beta"]},
    ),
    ("ssmax", "base", sa.SSMax(), {"trained": ["s"]}),
    ("stablemax", "attn_base", sa.StableMax(), {}),
    ("swat_balanced_alibi", "base", sa.SWAT(window=6), {}),
]


def close(name: str, got: Tensor, want: Tensor, atol: float) -> None:
    difference = float((got - want).detach().abs().max())
    assert difference <= atol, f"{name}: {difference:.2e} > {atol:.0e}"


@pytest.mark.parametrize(
    ("file", "name", "spec", "options"), CASES, ids=[f"{f}-{n}-{s.name}" for f, n, s, _ in CASES]
)
def test_outputs_and_gradients(
    file: str, name: str, spec: AttentionSpec, options: dict[str, Any]
) -> None:
    want = case(file, name)
    trained = options.get("trained", [])
    leaves = {n: want[n].clone().requires_grad_() for n in ["q", "k", "v", *trained]}
    params = {n: leaves[n] for n in trained}
    out = attend(spec, leaves["q"], leaves["k"], leaves["v"], params=params or None)
    close("out", out, want["out"], options.get("forward", FORWARD))
    grads = torch.autograd.grad(out, list(leaves.values()), want["grad_out"])
    for leaf, grad in zip(leaves, grads, strict=True):
        close(f"d{leaf}", grad, want[f"d{leaf}"], options.get("gradient", GRADIENT))


WEIGHTS = [c for c in CASES if c[3].get("weights") != "own"]


@pytest.mark.parametrize(
    ("file", "name", "spec", "options"),
    WEIGHTS,
    ids=[f"{f}-{n}-{s.name}" for f, n, s, _ in WEIGHTS],
)
def test_weights(file: str, name: str, spec: AttentionSpec, options: dict[str, Any]) -> None:
    """The attention map itself, as the output for one-hot values."""
    want = case(file, name)
    if "weights" not in want:
        pytest.skip("the file holds no weights")
    params = {n: want[n] for n in options.get("trained", [])}
    # Two values too many: the fused sink path needs head_dim == value_dim, the blocks do not.
    one_hot = torch.eye(17).expand(2, 4, 17, 17)
    got = attend(spec, want["q"], want["k"], one_hot, params=params or None)
    close("weights", got, want["weights"], options.get("forward", FORWARD))


def test_adaptive_temperature_polynomial() -> None:
    want = case("adaptive_temperature", "poly")
    close("beta", sa.AdaptiveTemperature().factor(want["entropy"]), want["beta"], FORWARD)


def test_adaptive_temperature_without_its_gradient() -> None:
    base, want = case("adaptive_temperature", "base"), case("adaptive_temperature", "base_nograd")
    leaves = [base[n].clone().requires_grad_() for n in "qkv"]
    out = attend(sa.AdaptiveTemperature(train_through=False), *leaves)
    for n, grad in zip("qkv", torch.autograd.grad(out, leaves, base["grad_out"]), strict=True):
        close(f"d{n}", grad, want[f"d{n}"], GRADIENT)


def test_asentmax_from_the_layers_input() -> None:
    want, params = case("asentmax", "adapt"), case("asentmax", "params")
    leaves = [want[n].clone().requires_grad_() for n in "qkv"]
    weights = {n: params[n] for n in ("W_beta", "W_gamma")}
    out = attend(sa.ASEntmax(), *leaves, params=weights, hidden=params["hidden"])
    close("out", out, want["out"], FORWARD)
    for n, grad in zip("qkv", torch.autograd.grad(out, leaves, want["grad_out"]), strict=True):
        close(f"d{n}", grad, want[f"d{n}"], GRADIENT)


def test_selective_token_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file gives f(x) as a field, so the perceptron is replaced by it; α = -1 in the paper's position part."""
    want = case("ssa_token_temperature", "base")
    leaves = [want[n].clone().requires_grad_() for n in "qkv"]
    fields = {"token": want["f_q"].tanh(), "values": want["f_v"].tanh()}
    monkeypatch.setattr(
        "hf_softheads.attention.selective._token_part", lambda name, hidden, params: fields[name]
    )
    spec = Selective(position="sigmoid", token=True, values=True)
    params = {**spec.init_params(Geometry(4, 4, 16, 4)), "beta": torch.tensor(-1.0)}
    out = attend(spec, *leaves, params=params, hidden=torch.zeros(2, 17, 4))
    close("out", out, want["out"], FORWARD)
    for n, grad in zip("qkv", torch.autograd.grad(out, leaves, want["grad_out"]), strict=True):
        close(f"d{n}", grad, want[f"d{n}"], GRADIENT)


def test_swat_slopes() -> None:
    want = golden("swat_balanced_alibi")["params.slopes"]
    assert torch.equal(sa.SWAT().slopes_of(4), want)


def test_uniattn_is_a_softmax_with_another_layers_values() -> None:
    first, shared = case("uniattn", "A"), case("uniattn", "B")
    close("A", attend(sa.Softmax(), first["q"], first["k"], first["v"]), first["out"], FORWARD)
    close("B", attend(sa.Softmax(), first["q"], first["k"], shared["v"]), shared["out"], FORWARD)


ROWS = [
    ("entmax15", sa.Entmax15()),
    ("entmax_bisect_1.25", sa.Entmax(alpha=1.25)),
    ("softpick", sa.Softpick()),
    ("sparsemax", sa.Sparsemax()),
    ("stablemax", sa.StableMax()),
]


@pytest.mark.parametrize(("file", "spec"), ROWS, ids=[f for f, _ in ROWS])
def test_rows(file: str, spec: AttentionSpec) -> None:
    """Row functions on scores up to 1e4; -inf marks hidden keys."""
    want = case(file, "rows")
    keep = want["x"] > -torch.inf
    x = want["x"].masked_fill(~keep, 0)[None, None].requires_grad_()
    keep = keep[None, None]
    close("y", spec.weights(x, keep, {})[0, 0], want["y"], FORWARD)
    known = want["dx"].isfinite()
    assert known.sum() >= known.numel() - 11  # the authors' stablemax gives NaN at x = 1
    by_autograd = torch.autograd.grad(spec.weights(x, keep, {}), x, want["grad_y"][None, None])[0]
    closed = spec.weights_vjp(x, keep, {}, want["grad_y"][None, None])[1]
    for grad in (by_autograd, closed):
        assert grad.isfinite().all()
        close("dx", grad[0, 0][known], want["dx"][known], GRADIENT)
