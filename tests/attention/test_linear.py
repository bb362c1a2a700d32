"""What variants with a recurrent state promise beyond the contract: three forms that agree, a state that goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_softheads.attention as sa
from hf_softheads.attention.base import AttentionSpec, attend
from hf_softheads.attention.linear import forms
from hf_softheads.attention.linear.elu_linear import raised
from hf_softheads.attention.linear.hedgehog import both_softmaxes
from hf_softheads.attention.linear.taylor_softmax import pairs, taylor_features
from tests.attention.samples import SLACK, SPECS, Sample, label, left_padded, sample
from tests.attention.test_contract import close
from tests.attention.test_golden import case

LINEAR = [spec for spec in SPECS if spec.has_state]
every_variant = pytest.mark.parametrize("spec", LINEAR, ids=label)


def run(given: Sample, **options: Any) -> Tensor:
    s = given
    return attend(
        s.spec, s.query, s.key, s.value, s.keep, params=s.params, hidden=s.hidden, **options
    )


def part(given: Sample, tokens: slice, keep: Tensor | None = None) -> Sample:
    """Some tokens of a sample: queries, keys and all."""
    changes = {n: getattr(given, n)[:, :, tokens] for n in ("query", "key", "value")}
    hidden = None if given.hidden is None else given.hidden[:, tokens]
    return replace(given, **changes, hidden=hidden, keep=keep)


@pytest.mark.parametrize(
    "spec", [s for s in LINEAR if s != sa.LoLCATs()], ids=label
)  # few blocks of 64
@pytest.mark.parametrize("length", [1, 31, 130])
def test_three_forms_agree(spec: AttentionSpec, length: int) -> None:
    """On lengths that fill no chunk, with padding on the left, in the middle and on the right; gradients too."""
    real = torch.ones(3, length, dtype=torch.bool)
    real[0, : length // 3] = False
    real[1, length // 2 : length // 2 + length // 5] = False
    real[2, length - length // 4 :] = False
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    dtype = torch.float64 if spec.name in SLACK else torch.float32
    for keep in (None, causal & real[:, None, None, :]):
        inputs = sample(spec, batch=3, queries=length, keep=keep, dtype=dtype).requires_grad()
        want = run(inputs, form="quadratic")
        asks = real[:, None, :, None] if keep is not None else torch.ones(1, dtype=torch.bool)
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)) * asks
        wanted = inputs.grads(want, grad)
        for form in ("chunked", "recurrent"):
            if form == "recurrent" and length > 64:
                continue
            out = run(inputs, form=form)
            close(form, out * asks, want * asks, 1e-5)
            for name, got in inputs.grads(out, grad).items():
                close(f"{form} d{name}", got, wanted[name], 1e-4)


@every_variant
def test_gradients_of_chunks_in_float64(spec: AttentionSpec, monkeypatch: Any) -> None:
    if getattr(spec, "train_through", True) is False:
        pytest.skip("its gradient leaves out a stabiliser on purpose")
    monkeypatch.setattr(forms, "CHUNK", 3)
    inputs = sample(
        spec, batch=1, heads=2, kv_heads=1, queries=8, dim=4, dtype=torch.float64,
        keep=left_padded([7], 8),
    ).requires_grad()  # fmt: skip
    leaves = inputs.leaves()

    def chunked(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        params = {n: given[n] for n in inputs.params}
        changes = {n: given[n] for n in ("query", "key", "value")}
        return run(
            replace(inputs, **changes, params=params, hidden=given.get("hidden")), form="chunked"
        )

    assert torch.autograd.gradcheck(chunked, tuple(leaves.values()), atol=1e-6, fast_mode=True)


@every_variant
def test_a_state_goes_on(spec: AttentionSpec) -> None:
    """A text in pieces, token by token or in chunks, left-padded, equals the text at once; the state does not grow."""
    keep = left_padded([40, 29], 40)
    for mask in (None, keep):
        whole = sample(spec, queries=40, keep=mask)
        want = run(whole)
        state, outputs, start = sa.State(), [], 0
        for length in (17, 1, 1, 19, 1, 1):
            tokens = slice(start, start + length)
            columns = None if mask is None else mask[:, :, tokens, tokens]
            outputs.append(run(part(whole, tokens, columns), state=state))
            start += length
            sizes = [t.shape for t in state.tensors]
        close("out", torch.cat(outputs, 2), want, SLACK.get(spec.name, 1) * 2e-5)
        before = sizes
        run(part(whole, slice(0, 5)), state=state)
        assert [t.shape for t in state.tensors] == before
        assert state.seen == 45


def test_decay_is_the_recurrence_of_its_formula() -> None:
    spec = sa.DecayLinear()
    inputs = sample(spec, queries=9, dtype=torch.float64)
    key, value = (x.repeat_interleave(2, 1) for x in (inputs.key, inputs.value))
    decay = (-inputs.params["rate"].exp()).exp()
    state = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    out = run(inputs)
    for t in range(9):
        entering = F.silu(key[:, :, t, :, None]) * value[:, :, t, None, :]
        state = decay[:, None, None] * state + entering
        read = (F.silu(inputs.query[:, :, t, None]) @ state)[:, :, 0]
        norm = read * (read.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        close("out", out[:, :, t], norm * inputs.params["gain"], 1e-12)


def test_decay_starts_as_published_and_may_be_kept() -> None:
    geometry = sa.Geometry(heads=8, kv_heads=8, head_dim=4, hidden_size=32, layer_idx=1, layers=4)
    rate = sa.DecayLinear().init_params(geometry)["rate"]
    close("log λ", -rate.exp(), -torch.arange(1.0, 9) * (1 - 1 / 4), 1e-6)
    kept = sample(sa.DecayLinear(learn=False)).requires_grad()
    grads = kept.grads(kept(), torch.ones(2, 4, 11, 8))
    assert (grads["rate"] == 0).all()
    assert (grads["gain"] != 0).any()


GOLDEN: list[tuple[str, str, AttentionSpec, dict[str, str], float, float]] = [
    (
        "hedgehog_lolcats",
        "linear.base",
        sa.Hedgehog(features=8),
        {"W_q": "W_q", "W_k": "W_k"},
        1e-5,
        2e-5,
    ),
    ("cosformer", "causal.base", sa.CosFormer(length=17), {}, 1e-5, 2e-5),
    ("mala", "causal_paperform.base", sa.MALA(), {}, 2e-5, 2e-5),
    ("mala", "causal_codeform.base", sa.MALA(a="code"), {}, 1e-5, 2e-5),
    ("fla_based_rebased_hedgehog", "based.base", sa.Based(dim=None), {}, 1e-5, 2e-5),
    (
        "fla_based_rebased_hedgehog",
        "rebased.base",
        sa.ReBased(dim=None),
        {"gamma": "gamma", "beta": "beta"},
        1e-4,
        1e-3,
    ),
    ("expressiveness_rnn", "taylor2.base", sa.TaylorSoftmax(terms=2), {}, 1e-5, 5e-5),
    ("expressiveness_rnn", "taylor10.base", sa.TaylorSoftmax(terms=10), {}, 1e-5, 2e-5),
    (
        "gmm_prf_kernel",
        "causal.base",
        sa.LearnedKernel(features=24),
        {"mean": "mean", "sigma": "sigma"},
        1e-5,
        2e-5,
    ),
]
FIXED = {
    "hedgehog_lolcats": lambda: {
        n: case("hedgehog_lolcats", "linear.base")[n] for n in ("W_q", "W_k")
    },
    "gmm_prf_kernel": lambda: case("gmm_prf_kernel", "params"),
    "fla_based_rebased_hedgehog": lambda: {
        n: case("fla_based_rebased_hedgehog", "featuremap")[n] for n in ("gamma", "beta")
    },
}


@pytest.mark.parametrize("form", ["quadratic", "chunked", "recurrent"])
@pytest.mark.parametrize(
    ("file", "name", "spec", "trained", "forward", "gradient"),
    GOLDEN,
    ids=[f"{g[0]}-{g[1]}" for g in GOLDEN],
)
def test_outputs_and_gradients_of_the_authors(
    file: str,
    name: str,
    spec: AttentionSpec,
    trained: Any,
    forward: float,
    gradient: float,
    form: str,
) -> None:
    if not spec.has_state and form != "quadratic":
        pytest.skip("a map of scores")
    want = case(file, name)
    known = {n: p.clone() for n, p in FIXED.get(file, dict)().items()}
    params = {n: known[n] for n in spec.init_params(sa.Geometry(4, 4, 16, 64))}
    leaves = {n: want[n].clone().requires_grad_() for n in "qkv"}
    leaves |= {n: params[n].requires_grad_() for n in trained}
    options = {"form": form} if spec.has_state else {}
    out = attend(spec, leaves["q"], leaves["k"], leaves["v"], params=params, **options)
    close("out", out, want["out"], forward)
    grads = torch.autograd.grad(out, list(leaves.values()), want["grad_out"])
    for leaf, grad in zip(leaves, grads, strict=True):
        close(f"d{leaf}", grad, want[f"d{leaf}"], gradient)
    if "weights" in want and form == "quadratic":
        one_hot = torch.eye(17).expand(2, 4, 17, 17)
        close(
            "weights",
            attend(spec, want["q"], want["k"], one_hot, params=params),
            want["weights"],
            forward,
        )


def test_performer_with_the_authors_stabiliser() -> None:
    """Theirs is the largest product with all keys, different for each sample; here it is given as the heads' number."""
    want, omega = (
        case("performer_favor", "causal.base"),
        case("performer_favor", "params")["projection"],
    )
    spec = sa.Performer(features=44)
    x = want["k"] * 16**-0.25
    largest = (x @ omega.mT).amax((-2, -1))
    for b in range(2):
        leaves = {n: want[n][b : b + 1].clone().requires_grad_() for n in "qkv"}
        out = attend(spec, *leaves.values(), params={"omega": omega, "shift": largest[b]})
        close("out", out, want["out"][b : b + 1], 1e-5)
        grads = torch.autograd.grad(out, list(leaves.values()), want["grad_out"][b : b + 1])
        for leaf, grad in zip(leaves, grads, strict=True):
            close(f"d{leaf}", grad, want[f"d{leaf}"][b : b + 1], 2e-5)
    orthogonal = spec.init_params(sa.Geometry(1, 1, 16, 16))["omega"][:16]
    close("blocks", orthogonal @ orthogonal.mT, torch.diag(orthogonal.square().sum(1)), 1e-5)


@pytest.mark.parametrize(
    ("file", "name", "spec"),
    [
        ("cosformer", "noncausal.base", sa.CosFormer(length=17)),
        ("mala", "norope.base", sa.MALA(a="code")),
    ],
    ids=["cosformer", "mala"],
)
def test_encoders_of_the_authors(file: str, name: str, spec: AttentionSpec) -> None:
    want, every = case(file, name), torch.ones(17, 17, dtype=torch.bool)
    leaves = {n: want[n].clone().requires_grad_() for n in "qkv"}
    for form in ("quadratic", "chunked"):
        out = attend(spec, *leaves.values(), every, causal=False, form=form)
        close("out", out, want["out"], 1e-5)
        grads = torch.autograd.grad(out, list(leaves.values()), want["grad_out"])
        for leaf, grad in zip(leaves, grads, strict=True):
            close(f"d{leaf}", grad, want[f"d{leaf}"], 2e-5)


def test_cosformer_does_not_change_with_the_length() -> None:
    """The authors' output for a prefix needs its own length; ours is the same for every prefix."""
    whole, prefix = case("cosformer", "causal.base"), case("cosformer", "causal_T9prefix")
    first = [whole[n][:, :, :9] for n in "qkv"]
    close("m = 9", attend(sa.CosFormer(length=9), *first), prefix["out"], 1e-5)
    close("m = 17", attend(sa.CosFormer(length=17), *first), whole["out"][:, :, :9], 1e-5)
    with pytest.raises(ValueError, match=r"cosformer\(length=8\) got a text of 9 tokens"):
        attend(sa.CosFormer(length=8), *first)


def test_terms_of_the_series_near_the_softmax() -> None:
    inputs = sample(sa.Softmax())
    want = run(inputs)
    errors = [
        float((run(replace(inputs, spec=sa.TaylorSoftmax(terms=n))) - want).abs().max())
        for n in (3, 5, 9, 15)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_features_as_the_authors_compute_them() -> None:
    want = case("hedgehog_lolcats", "feature_map")
    close("softmax", both_softmaxes(want["x"] @ want["W_q"], 1e-12), want["softmax_dim"], 1e-6)
    close("identity", both_softmaxes(want["x"], 1e-12), want["softmax_dim_identity"], 1e-6)
    close("elu", raised(want["x"]), want["pos_elu"], 1e-6)
    want = case("fla_based_rebased_hedgehog", "featuremap")
    root = 16**-0.25  # their order is another; products are what counts
    for got, theirs in (
        (taylor_features(want["x"] * root), want["taylor"]),
        (pairs(want["rebased_noflatten"] * root), want["rebased"]),
    ):
        assert got.shape == theirs.shape
        close("products", got @ got.mT, theirs @ theirs.mT, 1e-5)


@pytest.mark.parametrize("spec", [sa.EluLinear(), sa.Hedgehog()], ids=label)
def test_encoders_read_both_ways(spec: AttentionSpec) -> None:
    inputs = sample(spec, queries=70)
    keep = torch.ones(1, 1, 70, 70, dtype=torch.bool)
    keep[..., 60:] = False
    outs = [
        run(replace(inputs, keep=keep), causal=False, form=form) for form in (None, "quadratic")
    ]
    close("out", *outs, 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sa.Hedgehog(features=0), "features must be at least 1, got 0"),
        (lambda: run(sample(sa.Softmax()), form="chunked"), "softmax has no other form"),
        (lambda: run(sample(sa.Softmax()), state=sa.State()), "softmax has no other form"),
        (lambda: run(sample(sa.Hedgehog()), form="fast"), "one of quadratic, chunked, recurrent"),
        (lambda: run(sample(sa.DecayLinear()), causal=False), "an encoder's attention"),
        (
            lambda: run(sample(sa.Hedgehog()), form="quadratic", state=sa.State()),
            "a state holds no keys",
        ),
        (
            lambda: run(sample(sa.Hedgehog()), bias=torch.ones(11, 11)),
            "no scores that a bias could be added to",
        ),
    ],
)  # fmt: skip
def test_wrong_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_that_no_state_can_follow() -> None:
    packed = torch.tensor([0] * 4 + [1] * 7)
    keep = (packed[:, None] == packed) & torch.ones(11, 11, dtype=torch.bool).tril()
    inputs = sample(sa.EluLinear(), keep=keep)
    close("out", run(inputs), run(inputs, form="quadratic"), 1e-6)
    with pytest.raises(ValueError, match="packed sequences or a window"):
        run(inputs, form="chunked")
    with pytest.raises(ValueError, match="packed sequences or a window"):
        run(inputs, state=sa.State())


@pytest.mark.parametrize("form", ["quadratic", "chunked", "recurrent"])
def test_lolcats_as_the_authors_compute_it(form: str) -> None:
    want, maps = case("hedgehog_lolcats", "hybrid_sw.base"), case("hedgehog_lolcats", "linear.base")
    spec = sa.LoLCATs(window=4, features=8)
    leaves = {n: want[n].clone().requires_grad_() for n in "qkv"}
    leaves |= {n: maps[n].clone().requires_grad_() for n in ("W_q", "W_k")}
    factors = want["window_factors_logit"].flatten().clone().requires_grad_()
    params = {"W_q": leaves["W_q"], "W_k": leaves["W_k"], "window_factor": factors}
    out = attend(spec, leaves["q"], leaves["k"], leaves["v"], params=params, form=form)
    close("out", out, want["out"], 1e-5)
    *grads, dfactors = torch.autograd.grad(out, [*leaves.values(), factors], want["grad_out"])
    for name, grad in zip(leaves, grads, strict=True):
        close(f"d{name}", grad, want[f"d{name}"], 2e-5)
    close("dwindow", dfactors, want["dwindow_factors_logit"].flatten(), 2e-5)


def test_terraces_are_blocks_of_the_text() -> None:
    """Token 9 of blocks of 4: itself and block 1 by softmax, block 0 by features; the same wherever padding is."""
    spec = sa.LoLCATs(window=4, features=8, shape="terraced")
    inputs = sample(spec, batch=1, queries=12, dtype=torch.float64)
    one_hot = torch.eye(12, dtype=torch.float64).expand(1, 2, 12, 12)
    weights = run(replace(inputs, value=one_hot))[0, :, 9]
    key = inputs.key.repeat_interleave(2, 1)
    window = (inputs.query[0, :, 9, None] @ key[0].mT * 8**-0.5)[:, 0]
    window = (window - window[:, 4:10].amax(-1, keepdim=True)).exp()
    window = window * inputs.params["window_factor"].sigmoid().unsqueeze(-1)
    query = both_softmaxes(inputs.query[0, :, 9, None] @ inputs.params["W_q"], 1e-12)
    features = both_softmaxes(key[0] @ inputs.params["W_k"], 1e-12)
    linear = (query @ features.mT)[:, 0]
    want = torch.cat([linear[:, :4], window[:, 4:10], torch.zeros(4, 2)], -1)
    close("weights", weights, want / want.sum(-1, keepdim=True), 1e-10)


def test_gated_delta_is_the_rule_of_qwen3_next() -> None:
    """transformers' own recurrent function for that model computes the same, given α and β."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    from hf_softheads.attention.linear import delta

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 70, 3, 8, generator=generator) for _ in range(3))
    log_decay, beta = (
        -torch.rand(2, 70, 3, generator=generator),
        torch.rand(2, 70, 3, generator=generator),
    )
    want, state = torch_recurrent_gated_delta_rule(
        query, key, value, log_decay, beta, None, True, use_qk_l2norm_in_kernel=True
    )
    q, k = (F.normalize(x, dim=-1).transpose(1, 2) for x in (query, key))
    rest = value.transpose(1, 2), beta.transpose(1, 2), log_decay.transpose(1, 2)
    keep = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    close("quadratic", delta.quadratic(q * 8**-0.5, k, *rest, keep).transpose(1, 2), want, 2e-5)
    for form in (delta.chunked, delta.recurrent):
        out, last = form(q * 8**-0.5, k, *rest, torch.zeros(2, 3, 8, 8))
        close(form.__name__, out.transpose(1, 2), want, 2e-5)
        close("state", last, state, 2e-5)


def test_gated_delta_starts_with_a_long_memory() -> None:
    geometry = sa.Geometry(heads=3, kv_heads=3, head_dim=4, hidden_size=8)
    params = sa.GatedDelta(shortest=10, longest=1000).init_params(geometry)
    log_decay = -params["A"].exp() * F.softplus(params["b_a"])
    close("1/e after", -1 / log_decay, torch.tensor([10.0, 100.0, 1000.0]), 1e-3)
    assert (params["b_g"].sigmoid() > 0.99).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sa.LoLCATs(window=0), "window must be at least 1, got 0"),
        (lambda: sa.GatedDelta(shortest=9, longest=3), "longest must be at least shortest"),
        (lambda: run(sample(sa.LoLCATs()), causal=False), "an encoder's attention reads both ways"),
        (
            lambda: run(sample(sa.GatedDelta()), causal=False),
            "an encoder's attention reads both ways",
        ),
        (
            lambda: run(sample(sa.GatedDelta(), queries=3, keys=9)),
            "input of every key, got 3 for 9",
        ),
        (
            lambda: run(sample(sa.TaylorSoftmax(terms=9)), form="chunked"),
            "no other form and no state",
        ),
    ],
)
def test_more_wrong_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
