"""Adaptive softmax, sigsoftmax, temperature and mixture against their formulas."""

from __future__ import annotations

import pytest
import torch

from hf_softheads.heads import VQ, Adaptive, Dense, Mixture, Quantized, Sigsoftmax, Temperature
from hf_softheads.heads.base import HeadSpec
from tests.heads.conftest import Toy


def fit(spec: HeadSpec, toy: Toy) -> torch.nn.Module:
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, toy.stats)
    return head


def test_adaptive_is_a_product_of_two_choices(toy: Toy) -> None:
    head = fit(Adaptive((32, 128), div=2.0), toy)
    log_p = head(toy.hidden)  # type: ignore[operator]
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(toy.hidden)), rtol=1e-4, atol=0)
    order = head.order.long()  # type: ignore[union-attr, operator]
    assert torch.equal(order.sort().values, torch.arange(256))
    assert toy.stats.token_counts[order[:32]].min() >= toy.stats.token_counts[order[32:]].max()
    frequent = head.frequent(toy.hidden).log_softmax(-1)  # type: ignore[operator]
    band = log_p[:, order[128:]].logsumexp(-1)
    torch.testing.assert_close(band, frequent[:, 33], rtol=1e-4, atol=1e-4)


def test_adaptive_agrees_with_torch_on_its_own_parameters(toy: Toy) -> None:
    head = fit(Adaptive((32, 128), div=2.0), toy)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(16, 256, [32, 128], div_value=2.0, head_bias=True)
    with torch.no_grad():
        theirs.head.weight.copy_(head.weight)  # type: ignore[arg-type]
        theirs.head.bias.zero_()
        theirs.head.bias[32:] = head.band_bias
        for band, (down, up) in enumerate(theirs.tail):  # type: ignore[misc]
            down.weight.copy_(head.down[band])  # type: ignore[index]
            up.weight.copy_(head.up[band])  # type: ignore[index]
        expected = theirs.log_prob(toy.hidden)
        found = head(toy.hidden)[:, head.order.long()]  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adaptive_band_rows_follow_the_mass_of_the_band(toy: Toy) -> None:
    head = fit(Adaptive((64,), div=1.0), toy)  # full rank: only the band's row is approximate
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)
    kls = []
    with torch.no_grad():
        tail = dense[:, head.order.long()[64:]].logsumexp(-1).exp()  # type: ignore[union-attr, operator]
        mine = head.frequent(toy.hidden).softmax(-1)[:, -1]  # type: ignore[operator]
        for scale in (1.0, 0.0):
            head.weight[64:] *= scale  # type: ignore[index, operator]
            kls.append((dense.exp() * (dense - head(toy.hidden))).sum(-1).mean())
    assert torch.corrcoef(torch.stack([tail, mine]))[0, 1] > 0.6
    assert kls[0] < 0.7 * kls[1]


@pytest.mark.parametrize(
    "spec",
    [
        Adaptive(()),
        Adaptive((128, 32)),
        Adaptive((256,)),
        Adaptive((8, 16), div=5.0),
    ],
)
def test_adaptive_refuses_impossible_fields(spec: Adaptive) -> None:
    with pytest.raises(ValueError, match="adaptive asked for"):
        spec.check(16, 256)


def test_adaptive_needs_frequencies(toy: Toy) -> None:
    spec = Adaptive((32,))
    with pytest.raises(ValueError, match=r"token frequencies.*sh\.collect"):
        spec.fit(spec.module(16, 256), toy.weight, None, None)


@pytest.mark.parametrize("inner", [Dense(), Quantized(4), VQ(16)], ids=lambda s: s.name)
def test_sigsoftmax_is_exp_times_sigmoid(inner: HeadSpec, toy: Toy) -> None:
    head = fit(Sigsoftmax(inner=inner), toy)
    z = head.inner(toy.hidden).float()  # type: ignore[operator, union-attr]
    weight = z.double().exp() * z.double().sigmoid()
    found = head(toy.hidden).softmax(-1)
    torch.testing.assert_close(
        found.double(), weight / weight.sum(-1, keepdim=True), rtol=1e-3, atol=1e-6
    )
    assert torch.equal(head(toy.hidden).argmax(-1), z.argmax(-1))


def test_temperature_starts_at_one_and_learns_to_calibrate(toy: Toy) -> None:
    head = fit(Temperature(width=8), toy)
    start = head.temperature(toy.hidden)  # type: ignore[operator]
    torch.testing.assert_close(start, torch.ones_like(start), rtol=0, atol=2e-3)
    with torch.no_grad():
        head.inner.weight.mul_(1.6)  # type: ignore[union-attr, operator]
    trained = torch.optim.Adam([head.weight, head.out, head.shift], lr=0.05)  # type: ignore[list-item]
    losses = []
    for _ in range(60):
        trained.zero_grad()
        loss = head.token_loss(toy.hidden, toy.labels).mean()  # type: ignore[operator]
        loss.backward()
        trained.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    now = head.temperature(toy.hidden).detach()  # type: ignore[operator]
    assert 1.2 < float(now.mean()) < 2.0
    assert ((now >= 0.5) & (now <= 2.0)).all()


def test_mixture_is_a_mixture(toy: Toy) -> None:
    head = fit(Mixture(components=3, noise=1.0), toy)
    with torch.no_grad():
        head.gate.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[operator, union-attr]
        share = (toy.hidden @ head.gate.T).softmax(-1)  # type: ignore[union-attr]
        expected = torch.zeros(len(toy.hidden), 256)
        for k in range(3):
            h = toy.hidden + (toy.hidden @ head.weight[k].T).tanh()  # type: ignore[index, union-attr]
            expected += share[:, k, None] * (h @ toy.weight.T).softmax(-1)
        found = head(toy.hidden).exp()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_mixture_without_noise_is_the_inner_distribution(toy: Toy) -> None:
    head = fit(Mixture(components=3, noise=0.0), toy)
    expected = (toy.hidden @ toy.weight.T).log_softmax(-1)
    torch.testing.assert_close(head(toy.hidden), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        Sigsoftmax(inner=VQ(1000)),
        Temperature(inner=VQ(1000)),
        Mixture(inner=VQ(1000)),
    ],
)
def test_refuses_impossible_fields(spec: HeadSpec) -> None:
    with pytest.raises(ValueError, match="asked for"):
        spec.check(16, 256)
