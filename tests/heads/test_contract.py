"""What every output head promises, for every variant that is registered."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hf_softheads.heads  # noqa: F401 - registers the variants
from hf_softheads.heads import (
    LowRank,
    ProductVQ,
    Quantized,
    base,
    context_screen,
    fourier,
    product_vq,
)
from hf_softheads.heads.base import HeadSpec, LogitTransform
from hf_softheads.heads.fit import blockwise as fitting
from hf_softheads.heads.fit import kmeans
from hf_softheads.heads.fit import tree_nodes as tree_fit
from hf_softheads.registry import spec_from_dict, variants
from tests.heads.conftest import Toy, fitted, kl

NAMES = sorted(variants("head"))
COMPOSED: dict[str, HeadSpec] = {
    "low_rank in 8 bits": LowRank(8, Quantized(8)),
    "quantized, frequent rows in 8 bits": Quantized(3, frequent=40),
    "product_vq, structured": ProductVQ(8, 16, rotation="structured"),
}
TRANSFORMS = {
    "none": LogitTransform(),
    "scale": LogitTransform((("div", 1.5),)),
    "soft cap": LogitTransform((("div", 8.0), ("tanh", 1.0), ("mul", 8.0))),
}


def specs(name: str, toy: Toy) -> list[HeadSpec]:
    return variants("head")[name].ladder(*toy.shape)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[*NAMES, *COMPOSED])
def middle(request: pytest.FixtureRequest, toy: Toy) -> HeadSpec:
    if request.param in COMPOSED:
        return COMPOSED[request.param]
    ladder = specs(request.param, toy)
    return ladder[len(ladder) // 2]


def test_spec_survives_json(name: str, toy: Toy) -> None:
    assert specs(name, toy)
    for spec in specs(name, toy):
        assert spec_from_dict("head", spec.to_dict()) == spec


def test_lossless_setting_reproduces_the_dense_logits(name: str, toy: Toy) -> None:
    spec = variants("head")[name].lossless(*toy.shape)
    if spec is None:
        pytest.skip("has no lossless setting")
    hidden = toy.hidden[:256]
    found = fitted(spec, toy).logits(hidden)
    torch.testing.assert_close(found, hidden @ toy.weight.T, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_more_budget_less_error(name: str, toy: Toy) -> None:
    heads = [fitted(spec, toy) for spec in specs(name, toy)]
    for smaller, larger in itertools.pairwise(heads):
        assert smaller.nbytes < larger.nbytes
        assert kl(larger, toy) < kl(smaller, toy)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(7,), (2, 3), (0,), ()])
def test_methods_agree_with_forward(
    middle: HeadSpec, toy: Toy, transform: str, shape: tuple[int, ...]
) -> None:
    head = fitted(middle, toy, TRANSFORMS[transform]).eval()
    count = torch.Size(shape).numel()
    hidden, labels = toy.hidden[:count].view(*shape, 16), toy.labels[:count].view(shape)
    _check_methods(head, hidden, labels, transform)
    head.use_kernels("off")
    _check_methods(head, hidden, labels, transform)


def _check_methods(head: Any, hidden: Tensor, labels: Tensor, transform: str) -> None:
    shape = labels.shape
    logits = TRANSFORMS[transform](head(hidden).float())
    expected = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(head.log_prob(hidden, labels), expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(head.logsumexp(hidden), logits.logsumexp(-1), rtol=1e-4, atol=2e-5)
    for k in (1, 5, 200):
        values, tokens = head.topk(hidden, k)
        assert tokens.shape == (*shape, k)
        torch.testing.assert_close(values, logits.topk(k, -1).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.gather(-1, tokens), values, rtol=1e-5, atol=1e-5)
        assert (tokens.sort(-1).values.diff(dim=-1) > 0).all()  # all different
        most, likeliest = head.topk_log_prob(hidden, k)
        torch.testing.assert_close(
            most, values - logits.logsumexp(-1, keepdim=True), rtol=1e-4, atol=2e-5
        )
        torch.testing.assert_close(logits.gather(-1, likeliest), values, rtol=1e-5, atol=1e-5)
        for temperature in (1.0, 0.7):
            best, _, total = head.topk_logsumexp(hidden, k, temperature)
            torch.testing.assert_close(best, values, rtol=1e-5, atol=1e-5)
            expected = (logits / temperature).logsumexp(-1)
            torch.testing.assert_close(total, expected, rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="temperature must be positive"):
        head.topk_logsumexp(hidden, 1, 0.0)
    assert head.sample(hidden).shape == shape


@pytest.mark.parametrize(
    ("transform", "temperature"), [("none", 1.0), ("scale", 0.6), ("soft cap", 1.3)]
)
def test_samples_follow_the_distribution(
    middle: HeadSpec, toy: Toy, temperature: float, transform: str
) -> None:
    head = fitted(middle, toy, TRANSFORMS[transform])
    draws = 5_000
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)
    hidden = toy.hidden[(dense.exp() * dense).sum(-1).argmin()].expand(draws, -1)
    assert (head.logits(hidden[0]) / temperature).softmax(-1).max() < 0.9  # some doubt is left
    generator = torch.Generator().manual_seed(5)
    found = torch.bincount(
        head.sample(hidden, temperature=temperature, generator=generator), minlength=256
    )
    expected = draws * (head.logits(hidden[0]) / temperature).softmax(-1)
    likely = expected > 10
    chi2 = ((found - expected).square() / expected)[likely].sum()
    chi2 += (found[~likely].sum() - expected[~likely].sum()).square() / expected[
        ~likely
    ].sum().clamp_min(1)
    freedom = int(likely.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
    # every token a little too often or too rarely, as with another temperature, shows in the mean log-probability
    p = expected / draws
    surprise = p.log().clamp_min(-1e4)  # a token of probability 0 is drawn never
    mean = (p * surprise).sum()
    deviation = ((p * surprise.square()).sum() - mean.square()).clamp_min(0).sqrt()
    assert ((found / draws * surprise).sum() - mean).abs() <= 4 * deviation / draws**0.5 + 1e-5


def test_refuses_a_temperature_of_zero(middle: HeadSpec, toy: Toy) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        fitted(middle, toy).sample(toy.hidden[:2], temperature=0.0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_reach_every_parameter(middle: HeadSpec, toy: Toy, transform: str) -> None:
    head = fitted(middle, toy, TRANSFORMS[transform])
    hidden, labels = toy.hidden[:64].clone().requires_grad_(), toy.labels[:64]
    inputs = {"hidden": hidden, **dict(head.named_parameters())}
    mine = torch.autograd.grad(head.token_loss(hidden, labels).mean(), list(inputs.values()))
    logits = TRANSFORMS[transform](head(hidden).float())
    loss = torch.nn.functional.cross_entropy(logits, labels)
    plain = torch.autograd.grad(loss, list(inputs.values()))
    for key, a, b in zip(inputs, mine, plain, strict=True):
        assert a.isfinite().all(), key
        assert a.abs().sum() > 0, key
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_ignored_labels_count_nothing(middle: HeadSpec, toy: Toy) -> None:
    head = fitted(middle, toy)
    labels = toy.labels[:6].clone()
    labels[[1, 4]] = -100
    loss = head.token_loss(toy.hidden[:6], labels)
    assert loss[1] == 0
    assert loss[4] == 0
    torch.testing.assert_close(loss[0], -head.log_prob(toy.hidden[0], labels[0]))
    assert head.token_loss(toy.hidden[:2], torch.tensor([-100, -100])).sum() == 0


def test_state_dict_round_trip_through_meta(middle: HeadSpec, toy: Toy) -> None:
    head = fitted(middle, toy)
    with torch.device("meta"):
        loaded = middle.module(*toy.shape)
    loaded.load_state_dict({k: v.clone() for k, v in head.state_dict().items()}, assign=True)
    assert not any(t.is_meta for t in loaded.buffers())
    assert torch.equal(loaded(toy.hidden), head(toy.hidden))
    assert torch.equal(
        loaded.log_prob(toy.hidden, toy.labels), head.log_prob(toy.hidden, toy.labels)
    )
    assert "weight" in dict(head.named_parameters())


@pytest.mark.parametrize("change", ["in place", "deepcopy", "bfloat16", "assign"])
def test_lookup_tables_follow_the_tensors(middle: HeadSpec, toy: Toy, change: str) -> None:
    head = fitted(middle, toy)
    hidden, labels = toy.hidden[:32], toy.labels[:32]
    head.log_prob(hidden, labels), head.topk(hidden, 3), head.sample(hidden)  # build the tables
    if change == "deepcopy":
        head = copy.deepcopy(head)
    if change == "bfloat16":
        head, hidden = head.to(torch.bfloat16), hidden.bfloat16()
    if change == "assign":
        state = {
            k: v.flip(0) if k in dict(head.named_buffers()) and v.shape[:1] == (256,) else v.clone()
            for k, v in head.state_dict().items()
        }
        head.load_state_dict(state, assign=True)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.1)
        for buffer in head.buffers():
            if buffer.shape[:1] == (256,) and change == "in place":
                buffer.copy_(buffer.flip(0))
    with torch.no_grad():
        logits = head(hidden).float()
        found = head.log_prob(hidden, labels)
    expected = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(head.topk(hidden, 3)[0], logits.topk(3).values, rtol=1e-3, atol=1e-3)


def test_keeps_the_dense_bias(middle: HeadSpec, toy: Toy) -> None:
    """Shifting one token's bias by 3 shifts its logit by about 3 against the others."""
    if getattr(middle, "bias", "none") != "none":
        pytest.skip("fits its own bias from the statistics, which saw the dense one")
    dim, vocab = toy.shape
    bias = torch.zeros(vocab)
    bias[7] = 3.0
    head = middle.module(dim, vocab, bias=True)
    middle.fit(head, toy.weight, bias, toy.stats)
    hidden = toy.hidden[:64]
    moved = head.logits(hidden).log_softmax(-1) - fitted(middle, toy).logits(hidden).log_softmax(-1)
    shift = float((moved[:, 7] - moved[:, 100]).median().detach())
    assert shift == pytest.approx(3.0, abs=0.5)  # a tree only nearly


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_log_prob_never_holds_all_logits(
    middle: HeadSpec, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_CHUNK_ELEMENTS", 2**14)
    head = fitted(middle, toy)
    with torch.no_grad(), _Largest() as largest:
        head.log_prob(toy.hidden, toy.labels)
    assert largest.elements < len(toy.hidden) * toy.weight.shape[0] / 8


class _Copies(TorchDispatchMode):
    """Counts the fp32 copies of a half-precision matrix of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            half = args[0].dtype == torch.bfloat16 and args[0].shape == self.shape
            self.count += half and result.dtype.itemsize > 2
        return result


@pytest.mark.slow
def test_fit_takes_half_precision_a_block_at_a_time(
    middle: HeadSpec, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_ROWS", 96)
    monkeypatch.setattr(tree_fit, "_LEAVES", 96)
    monkeypatch.setattr(product_vq, "_ROWS", 96)
    monkeypatch.setattr(kmeans, "_BLOCK_ELEMENTS", 96 * 16)
    monkeypatch.setattr(kmeans, "_CHUNK_ELEMENTS", 96 * 32)
    monkeypatch.setattr(fourier, "_STEPS", 20)
    monkeypatch.setattr(context_screen, "_STEPS", 10)
    few = replace(toy.stats, states=toy.stats.states[:512], labels=toy.stats.labels[:512])
    half = replace(toy, weight=toy.weight.bfloat16(), stats=few)
    with _Copies(half.weight.shape) as copies:
        found = fitted(middle, half)
    assert copies.count == 0
    same = fitted(middle, replace(half, weight=half.weight.float()))
    torch.testing.assert_close(found.logits(toy.hidden), same.logits(toy.hidden))


def test_sizes_are_stated(middle: HeadSpec, toy: Toy) -> None:
    head = fitted(middle, toy)
    assert head.nbytes == sum(t.numel() * t.itemsize for t in head.state_dict().values())
    assert 0 < head.bytes_read <= head.nbytes
    assert 0 < head.n_parameters == sum(p.numel() for p in head.parameters())
    assert head.flops > 0
    assert all(isinstance(line, str) for line in head.notes())


def test_refuses_to_fit_what_it_did_not_build(name: str, toy: Toy) -> None:
    dim, vocab = toy.shape
    spec = specs(name, toy)[0]
    other = (LowRank(2) if name == "quantized" else Quantized(4)).module(dim, vocab)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"not this {type(other).__name__}.*spec\.module\({dim}, "
    ):
        spec.fit(other, toy.weight, None, toy.stats)
    torch.testing.assert_close(dict(other.state_dict()), before, equal_nan=True)  # as found
    larger = spec.module(dim, vocab + 1)
    with pytest.raises(ValueError, match=r"they differ in .*size"):
        spec.fit(larger, toy.weight, None, toy.stats)
