"""What every attention variant must do, whatever its formula; discovered from the registry."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_softheads.attention.base import AttentionSpec, Geometry, Inputs, autograd_vjp
from hf_softheads.attention.engines import query_blocks, sdpa
from hf_softheads.registry import spec_from_dict
from tests.attention.samples import ROW_MAPS, SLACK, SPECS, label, left_padded, sample

every_variant = pytest.mark.parametrize("spec", SPECS, ids=label)
every_row_map = pytest.mark.parametrize("spec", ROW_MAPS, ids=label)


def close(name: str, got: Tensor, want: Tensor, atol: float = 2e-6) -> None:
    got, want = got.detach().double(), want.detach().double()
    scale = max(1.0, float(want.abs().max()))
    difference = float((got - want).abs().max())
    assert difference <= atol * scale, f"{name}: {difference:.2e} > {atol * scale:.2e}"


@every_row_map
def test_hidden_keys_weigh_nothing(spec: AttentionSpec) -> None:
    torch.manual_seed(0)
    scores = 3 * torch.randn(2, 4, 9, 13)
    keep = torch.rand(2, 1, 9, 13) < 0.5
    keep[:, :, 4] = False
    params = sample(spec).params
    weights = spec.weights(scores, keep, params)
    assert weights.isfinite().all()
    assert (weights.masked_select(~keep) == 0).all()
    assert (weights[:, :, 4] == 0).all()
    spoiled = scores.masked_fill(~keep, 1e4)
    close("weights", spec.weights(spoiled, keep, params), weights, 0)
    if spec.sums_to_one:
        close("sum", weights.sum(-1), keep.any(-1).expand(2, 4, 9).float(), 2e-6)
    if not spec.exact_zeros:
        assert (weights.masked_select(keep.expand_as(weights)) != 0).all()


@every_variant
def test_rows_that_see_nothing_are_zero_and_move_nothing(spec: AttentionSpec) -> None:
    keep = left_padded([11, 6], 11)
    padded = sample(spec, keep=keep).requires_grad()
    out = padded()
    assert (out[1, :, :5] == 0).all()
    grads = padded.grads(out, torch.ones_like(out))
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
    assert (grads["query"][1, :, :5] == 0).all()
    assert (grads["key"][1, :, :5] == 0).all()
    assert (grads["value"][1, :, :5] == 0).all()
    only_padding = torch.zeros_like(out)
    only_padding[1, :, :5] = 1
    for name, grad in padded.grads(padded(), only_padding).items():
        assert (grad == 0).all(), name


@every_variant
def test_no_query_sees_the_future(spec: AttentionSpec) -> None:
    honest = sample(spec)
    spoiled = replace(honest, key=honest.key.clone(), value=honest.value.clone())
    spoiled.key[:, :, 7:] += 100
    spoiled.value[:, :, 7:] -= 100
    assert torch.equal(spoiled()[:, :, :7], honest()[:, :, :7])


@every_variant
def test_blocks_equal_the_whole_matrix(
    spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keep in (None, left_padded([150, 97], 150)):
        inputs = sample(spec, queries=150, dtype=torch.float64, keep=keep).requires_grad()
        grad = torch.randn(2, 4, 150, 8, generator=torch.Generator().manual_seed(1)).double()
        out = inputs()
        grads = inputs.grads(out, grad)
        with torch.no_grad():
            close("without gradients", inputs(), out, 1e-12)
        with monkeypatch.context() as patch:
            patch.setattr(query_blocks, "attend", query_blocks.whole)
            patch.setattr(sdpa, "supports", lambda _: "not here")
            whole = inputs()
            wanted = inputs.grads(whole, grad)
        close("out", out, whole, 1e-10)
        for name, want in wanted.items():
            close(f"d{name}", grads[name], want, 1e-8)


@every_variant
def test_gradients_in_float64(spec: AttentionSpec) -> None:
    inputs = sample(
        spec,
        batch=1,
        heads=2,
        kv_heads=1,
        queries=5,
        dim=4,
        dtype=torch.float64,
        keep=left_padded([4], 5),
    ).requires_grad()
    leaves = inputs.leaves()
    if getattr(spec, "train_through", True) is False:
        pytest.skip("its gradient leaves out β, or a stabiliser, on purpose")

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(leaves, tensors, strict=True))
        return inputs(
            query=given["query"],
            key=given["key"],
            value=given["value"],
            params={n: given[n] for n in inputs.params},
            hidden=given.get("hidden"),
        )

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), atol=1e-6, fast_mode=True)


@every_row_map
def test_closed_gradients_equal_autograd(spec: AttentionSpec) -> None:
    if type(spec).weights_vjp is AttentionSpec.weights_vjp:
        pytest.skip("no closed form")
    torch.manual_seed(2)
    scores = 2 * torch.randn(2, 3, 7, 9, dtype=torch.float64)
    keep = (torch.rand(2, 1, 7, 9) < 0.7).index_fill(2, torch.tensor([3]), False)
    grad = torch.randn_like(scores)
    params = {n: p.double() for n, p in sample(spec, heads=3, kv_heads=3).params.items()}
    want = autograd_vjp(spec.weights, scores, keep, params, grad)
    got = spec.weights_vjp(scores, keep, params, grad)
    close("weights", got[0], want[0], 1e-12)
    close("scores", got[1], want[1], 1e-10)


@every_variant
@pytest.mark.parametrize("scale", [1e-5, 1e-2, 20.0, 1e4])
def test_any_scale_of_scores(spec: AttentionSpec, scale: float) -> None:
    """Scale 20 gives scores to about ±60: as accurate as the same inputs in float64, and finite further out."""
    inputs = sample(spec, queries=40, scale=scale).requires_grad()
    out = inputs()
    grads = inputs.grads(out, torch.ones_like(out))
    assert out.isfinite().all()
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
    if scale > 100:
        return
    exact = inputs.to(torch.float64)
    close("out", out, exact(), 3e-5 * max(1.0, getattr(spec, "p", 1), SLACK.get(spec.name, 1)))


@every_variant
def test_one_query_over_a_cache_equals_the_full_forward(spec: AttentionSpec) -> None:
    if not spec.decode_safe:
        pytest.skip("not decode-safe by its formula")
    if spec.has_state and spec.needs_hidden:
        pytest.skip(
            "it needs the layer's input of every key: it goes on from its state, see test_linear.py"
        )
    full, slack = sample(spec), SLACK.get(spec.name, 1)
    want = full()
    for t in range(11):
        hidden = None if full.hidden is None else full.hidden[:, t : t + 1]
        query = full.query[:, :, t : t + 1]
        seen = full(
            query=query, key=full.key[:, :, : t + 1], value=full.value[:, :, : t + 1], hidden=hidden
        )
        close(
            f"growing cache at {t}", seen, want[:, :, t : t + 1], slack * 6e-6
        )  # adds in another order
        written = (torch.arange(11) <= t).view(1, 1, 1, -1)
        static = full(query=query, keep=written, hidden=hidden)
        close(f"static cache at {t}", static, want[:, :, t : t + 1], slack * 6e-6)
    chunk = full(
        query=full.query[:, :, 6:],
        hidden=None if full.hidden is None else full.hidden[:, 6:],
    )
    close("a chunk after a prefix", chunk, want[:, :, 6:], slack * 6e-6)


@every_variant
def test_left_padding_equals_none(spec: AttentionSpec) -> None:
    padded = sample(spec, keep=left_padded([11, 6], 11))
    alone = replace(
        padded,
        query=padded.query[1:, :, 5:],
        key=padded.key[1:, :, 5:],
        value=padded.value[1:, :, 5:],
        keep=None,
        hidden=None if padded.hidden is None else padded.hidden[1:, 5:],
    )
    close("out", padded()[1:, :, 5:], alone())


@every_variant
def test_packed_sequences_do_not_mix(spec: AttentionSpec) -> None:
    packed = sample(spec, batch=1)
    part = torch.tensor([0] * 4 + [1] * 7)
    keep = (part[:, None] == part) & torch.ones(11, 11, dtype=torch.bool).tril()
    out = packed(keep=keep)
    for rows in (slice(0, 4), slice(4, 11)):
        alone = packed(
            query=packed.query[:, :, rows],
            key=packed.key[:, :, rows],
            value=packed.value[:, :, rows],
            hidden=None if packed.hidden is None else packed.hidden[:, rows],
        )
        close("out", out[:, :, rows], alone)


@every_variant
def test_grouped_keys_equal_repeated_ones(spec: AttentionSpec) -> None:
    grouped = sample(spec).requires_grad()
    repeated = replace(
        grouped,
        key=grouped.key.repeat_interleave(2, 1),
        value=grouped.value.repeat_interleave(2, 1),
    )
    out = grouped()
    close("out", out, repeated())
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    got = grouped.grads(out, grad)
    want = grouped.grads(repeated(), grad)
    for name in want:
        close(f"d{name}", got[name], want[name], 1e-5 * getattr(spec, "p", 1))


@every_variant
def test_bfloat16_is_fp32_inside(spec: AttentionSpec) -> None:
    half = sample(spec, dtype=torch.bfloat16, queries=40)
    full = half.to(torch.float32)
    want = full()
    out = half()
    assert out.dtype == torch.bfloat16
    close("out", out, want, 2**-8)  # the one rounding at the end
    trained = half.requires_grad()
    out = trained()
    for name, grad in trained.grads(out, torch.ones_like(out)).items():
        assert grad.isfinite().all(), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full(), want)


@every_variant
def test_the_module_is_the_function(spec: AttentionSpec) -> None:
    geometry = Geometry(heads=4, kv_heads=2, head_dim=8, hidden_size=12)
    torch.manual_seed(0)
    module = spec.module(geometry)
    arguments = sample(spec)
    inputs = Inputs(arguments.query, arguments.key, arguments.value, None, 8**-0.5)
    inputs = inputs.replace(hidden=arguments.hidden)
    params = dict(module.named_parameters())
    assert params.keys() == spec.init_params(geometry).keys()
    out = module(inputs)
    assert torch.equal(out, arguments(params=params))
    with torch.device("meta"):
        empty = spec.module(geometry)
    assert all(p.is_meta for p in empty.parameters())
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert torch.equal(out, empty(inputs))
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(torch.nan)
    module.reset_parameters()
    assert all(p.isfinite().all() for p in module.parameters())


@every_variant
def test_json_round_trip(spec: AttentionSpec) -> None:
    assert spec_from_dict("attention", json.loads(json.dumps(spec.to_dict()))) == spec


# a row map, a scaled query, an identity, a position bias in a window, the layer's input
TRACED_BACKWARDS = ("softpick", "ssmax", "learned_sink", "swat", "gated")


RECURRENT = (
    "elu_linear",
    "decay_linear",
    "lolcats",
    "gated_delta",
)  # the other variants with a state are the same graph with other features
FEW = ("softmax", "softpick", "ssmax", "entmax15", "selective", "decay_linear", "lolcats")
GRAPHS = [s for s in SPECS if s == type(s)() and (not s.has_state or s.name in RECURRENT)]


@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=() if s.name in FEW else pytest.mark.slow) for s in GRAPHS],
    ids=label,
)
def test_compiles_without_graph_breaks(spec: AttentionSpec) -> None:
    inputs = sample(spec, queries=9).requires_grad()
    keep = left_padded([9, 6], 9)
    compiled = torch.compile(
        lambda q, k, v: inputs(query=q, key=k, value=v, keep=keep),
        fullgraph=True,
        backend="aot_eager" if spec.name in TRACED_BACKWARDS else "eager",
    )
    out = compiled(inputs.query, inputs.key, inputs.value)
    want = inputs(keep=keep)
    close("out", out, want, 1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    got, wanted = inputs.grads(out, grad), inputs.grads(want, grad)
    for name in wanted:
        close(f"d{name}", got[name], wanted[name], 1e-5 * getattr(spec, "p", 1) ** 2)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.name in ("softpick", "learned_sink", "softmax")], ids=label
)
def test_dropout_is_that_of_the_weights(spec: AttentionSpec) -> None:
    """Unbiased in every entry, drawn anew in every call and block; the backward pass meets the forward's mask."""
    inputs = sample(spec, batch=1, queries=70, dtype=torch.float64).requires_grad()
    module = spec.module(Geometry(heads=4, kv_heads=2, head_dim=8, hidden_size=12)).double()

    def run(dropout: float = 0.5, value: Tensor = inputs.value) -> Tensor:
        return module(Inputs(inputs.query, inputs.key, value, None, 8**-0.5, dropout=dropout))

    torch.manual_seed(0)
    first = run()
    assert not torch.equal(run(), first)
    draws, exact = torch.stack([run().detach() for _ in range(400)]), run(0.0).detach()
    # 2,240 entries of nearly normal means: the largest is expected at 3.6 of its standard errors
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error).all()
    # and all together: the factor of the exact output in a draw is 1 on average
    factor = (draws * exact).flatten(1).sum(1) / exact.square().sum()
    error = factor.std() / len(draws) ** 0.5
    assert error < 0.008  # so that a factor that is 4 % off shows
    assert (factor.mean() - 1).abs() <= 5 * error
    # an entry is the weighted sum of values that stay with probability ½, each at twice its weight
    one_hot = torch.eye(70, dtype=torch.float64).expand(1, 2, 70, 70)
    weights = run(0.0, one_hot).detach()
    variance = weights.square() @ inputs.value.detach().repeat_interleave(2, 1).square()
    seen = variance > 0  # softpick gives some queries no weight at all
    ratio = (draws.var(0)[seen] / variance[seen]).mean()
    assert (ratio - 1).abs() < 0.02  # 5 · √(2 / 400) / √280 by 400 draws of 280 independent rows
    # queries 0 and 64 begin two blocks of queries: key 0 stays for both, or for neither, half of the time
    alive = (weights[0, :, 0, 0] > 0) & (weights[0, :, 64, 0] > 0)
    stays = torch.stack([run(0.5, one_hot)[0, :, [0, 64], 0] > 0 for _ in range(40)])
    equal = (stays[:, :, 0] == stays[:, :, 1])[:, alive]
    assert equal.any(0).all()
    assert not equal.all(0).any()

    def seeded(value: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run(value=value)

    (grad,) = torch.autograd.grad(seeded(inputs.value).sum(), inputs.value)
    step = torch.zeros_like(grad)
    step[0, 1, 3, 2] = 1.0  # the output is linear in the values
    with torch.no_grad():
        slope = (seeded(inputs.value + step) - seeded(inputs.value)).sum()
    close("slope", slope, grad[0, 1, 3, 2], 1e-9)
