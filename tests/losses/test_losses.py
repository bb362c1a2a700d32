"""Every registered loss against a plain definition in numpy, and its gradient against finite differences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq

import hf_softheads.losses as L
from hf_softheads.losses.base import LossSpec, SampledLoss, SummaryLoss, summary
from hf_softheads.losses.sampled_softmax import draw, log_chance
from hf_softheads.registry import spec_from_dict, variants

N, V = 6, 12
LEVELS = (tuple(v // 2 for v in range(V)), tuple(v // 6 for v in range(V)))
Row = np.ndarray


def softmax(z: Row) -> Row:
    e = np.exp(z - z.max())
    return e / e.sum()


def kl(p: Row, q: Row) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def cross_entropy(z: Row, y: int, *_: Any) -> float:
    return -math.log(softmax(z)[y])


def spherical_z(z: Row, y: int, t: Row, s: Any) -> float:
    c = (z[y] - z.mean()) / z.std()
    return math.log(1 + math.exp(s.a * (s.b - c))) / s.a


def sparse_softmax(z: Row, y: int, t: Row, s: Any) -> float:
    kept = set(np.argsort(-z)[: s.k]) | {y}
    return math.log(sum(math.exp(z[v]) for v in kept)) - z[y]


def fenchel_young(alpha: float) -> Callable[..., float]:
    def loss(z: Row, y: int, *_: Any) -> float:
        def p(tau: float) -> Row:
            return np.maximum((alpha - 1) * z - tau, 0) ** (1 / (alpha - 1))

        top = (alpha - 1) * z.max()
        q = p(brentq(lambda tau: p(tau).sum() - 1, top - 1, top, xtol=1e-15))
        omega = (1 - (q**alpha).sum()) / (alpha * (alpha - 1))
        return float(omega + (q - np.eye(len(z))[y]) @ z)

    return loss


def stablemax(z: Row, y: int, *_: Any) -> float:
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in z]
    return -math.log(s[y] / sum(s))


def sigsoftmax(z: Row, y: int, *_: Any) -> float:
    s = np.exp(z) / (1 + np.exp(-z))
    return -math.log(s[y] / s.sum())


def taylor_softmax(z: Row, y: int, *_: Any) -> float:
    s = 1 + z + z**2 / 2
    return -math.log(s[y] / s.sum())


def multi_margin(z: Row, y: int, t: Row, s: Any) -> float:
    others = [v for v in range(V) if v != y]
    return sum(max(0.0, s.margin - z[y] + z[v]) ** s.power for v in others) / V


def soft_top_k(z: Row, y: int, t: Row, s: Any) -> float:
    def sigma(x: Row) -> Row:
        return 1 / (1 + np.exp(-s.alpha * x))

    threshold = brentq(lambda b: sigma(z - b).sum() - s.k, -60, 60, xtol=1e-14)
    return -math.log(sigma(z - threshold)[y])


def pairwise_softmax(z: Row, y: int, t: Row, s: Any) -> float:
    activation = {
        "tanh": lambda d: np.tanh(d) + 1,
        "relu": lambda d: max(d + 1, 0.0),
        "atan": lambda d: max(math.atan(d) + 1, 0.0),
    }[s.activation]
    return math.log(sum(activation((x - z[y]) / s.temperature) ** (1 / s.outer) for x in z))


def semantic_softmax(z: Row, y: int, t: Row, s: Any) -> float:
    p = softmax(z)
    loss = -s.leaf * math.log(p[y])
    for level in s.levels:
        loss -= math.log(sum(p[v] for v in range(V) if level[v] == level[y]))
    return loss


def forward_kl(z: Row, y: int, t: Row, s: Any) -> float:
    return kl(softmax(t / s.temperature), softmax(z / s.temperature)) * s.temperature**2


def reverse_kl(z: Row, y: int, t: Row, s: Any) -> float:
    return kl(softmax(z / s.temperature), softmax(t / s.temperature)) * s.temperature**2


def jsd(z: Row, y: int, t: Row, s: Any) -> float:
    p, q = softmax(t / s.temperature), softmax(z / s.temperature)
    m = s.beta * p + (1 - s.beta) * q
    return (s.beta * kl(p, m) + (1 - s.beta) * kl(q, m)) * s.temperature**2


def akl(z: Row, y: int, t: Row, s: Any) -> float:
    p, q = softmax(t), softmax(z)
    head, mass = [], 0.0
    for v in np.argsort(-p):
        if mass >= s.mass:
            break
        head.append(v)
        mass += p[v]
    gap = np.abs(p - q)
    w = gap[head].sum() / gap.sum()
    return w * kl(p, q) + (1 - w) * kl(q, p)


def nkd(z: Row, y: int, t: Row, s: Any) -> float:
    rest = [v for v in range(V) if v != y]
    p, q = softmax(t[rest] / s.temperature), softmax(z[rest] / s.temperature)
    own = -softmax(t)[y] * math.log(softmax(z)[y])
    return own - s.gamma * s.temperature**2 * float(p @ np.log(q))


def pld(z: Row, y: int, t: Row, s: Any) -> float:
    order = [y, *(v for v in np.argsort(-t) if v != y)]
    q = softmax(t / s.temperature)
    terms = [
        q[v] * (math.log(sum(math.exp(z[u]) for u in order[i:])) - z[v])
        for i, v in enumerate(order[: s.k])
    ]
    return float(sum(terms))


def top_k_kl(z: Row, y: int, t: Row, s: Any) -> float:
    p, q = softmax(t), softmax(z)
    best = list(np.argsort(-t)[: s.k])
    rest = [v for v in range(V) if v not in best]
    pooled = [np.append(x[best], x[rest].sum()) for x in (p, q)]
    return kl(pooled[0], pooled[1])


DEFINITIONS: dict[str, tuple[list[LossSpec], Callable[..., float]]] = {
    "cross_entropy": ([L.CrossEntropy()], cross_entropy),
    "label_smoothing": (
        [L.LabelSmoothing(), L.LabelSmoothing(alpha=0.7)],
        lambda z, y, t, s: (
            (1 - s.alpha) * cross_entropy(z, y) - s.alpha * float(np.log(softmax(z)).mean())
        ),
    ),
    "z_loss": ([L.ZLoss()], lambda z, y, *_: math.log(np.exp(z).sum()) ** 2),
    "spherical_z": ([L.SphericalZ(), L.SphericalZ(a=2.5, b=1.0)], spherical_z),
    "sparse_softmax": ([L.SparseSoftmax(k=3), L.SparseSoftmax(k=99)], sparse_softmax),
    "sparsemax": ([L.Sparsemax()], fenchel_young(2.0)),
    "entmax15": ([L.Entmax15()], fenchel_young(1.5)),
    "stablemax": ([L.StableMax()], stablemax),
    "sigsoftmax": ([L.Sigsoftmax()], sigsoftmax),
    "taylor_softmax": ([L.TaylorSoftmax()], taylor_softmax),
    "multi_margin": ([L.MultiMargin(), L.MultiMargin(margin=2.0, power=2)], multi_margin),
    "decoupled_softmax": ([L.DecoupledSoftmax()], cross_entropy),
    "soft_top_k": ([L.SoftTopK(k=3), L.SoftTopK(k=5, alpha=0.5)], soft_top_k),
    "pairwise_softmax": (
        [
            L.PairwiseSoftmax(),
            L.PairwiseSoftmax(activation="relu", temperature=0.7),
            L.PairwiseSoftmax(activation="atan", outer=2.0),
        ],
        pairwise_softmax,
    ),
    "semantic_softmax": ([L.SemanticSoftmax(levels=LEVELS, leaf=0.5)], semantic_softmax),
    "kl": ([L.KL(), L.KL(temperature=2.0)], forward_kl),
    "reverse_kl": ([L.ReverseKL(), L.ReverseKL(temperature=0.5)], reverse_kl),
    "jsd": ([L.JSD(), L.JSD(beta=0.2, temperature=3.0)], jsd),
    "akl": ([L.AKL(), L.AKL(mass=0.9)], akl),
    "nkd": ([L.NKD(), L.NKD(gamma=0.5, temperature=2.0)], nkd),
    "pld": ([L.PLD(), L.PLD(k=4, temperature=4.0)], pld),
    "top_k_kl": ([L.TopKKL(k=3), L.TopKKL(k=V)], top_k_kl),
    "hidden_mse": ([L.HiddenMSE()], lambda z, y, t, s: float(((z - t) ** 2).mean())),
}
RANDOM: dict[str, LossSpec] = {  # these draw numbers; their definitions are tested one by one below
    "noisy_softmax": L.NoisySoftmax(alpha=0.3),
    "sampled_softmax": L.SampledSoftmax(samples=7),
    "negative_sampling": L.NegativeSampling(samples=5),
    "partial_fc": L.PartialFC(rate=0.7, margin=0.3, scale=4.0),
}
SPECS = [spec for specs, _ in DEFINITIONS.values() for spec in specs] + list(RANDOM.values())


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    t = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    return z, torch.randint(0, V, (N,), generator=g), t


def seeded(spec: LossSpec, z: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    if getattr(spec, "cosine", False):
        z = torch.tanh(z)
    if isinstance(spec, L.NoisySoftmax):
        return spec.per_token(z, y, t, norms=torch.full_like(z[:, 0], 9.0))
    return spec.per_token(z, y, t)


def test_every_loss_has_a_definition() -> None:
    assert set(variants("loss")) == set(DEFINITIONS) | set(RANDOM)


@pytest.mark.parametrize(
    ("name", "spec"), [(k, s) for k, (specs, _) in DEFINITIONS.items() for s in specs], ids=str
)
def test_value_equals_the_definition(name: str, spec: LossSpec, sample: Any) -> None:
    z, y, t = sample
    define = DEFINITIONS[name][1]
    expected = [define(z[i].numpy(), int(y[i]), t[i].numpy(), spec) for i in range(N)]
    torch.testing.assert_close(
        spec.per_token(z, y, t), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10
    )


# akl's weights are constants to the gradient: test_akl_gradient holds them
@pytest.mark.parametrize("spec", [s for s in SPECS if s.name != "akl"], ids=str)
def test_gradient_equals_finite_differences(spec: LossSpec, sample: Any) -> None:
    z, y, t = sample
    z = z.requires_grad_()
    check = functools.partial(torch.autograd.gradcheck, atol=1e-6, rtol=1e-4, fast_mode=True)
    assert check(lambda x: seeded(spec, x, y, t), (z,))


def test_akl_gradient(sample: Any) -> None:
    z, y, t = sample
    p = t.softmax(-1)
    s = z.softmax(-1)
    order = p.argsort(-1, descending=True)
    ranked = p.gather(-1, order)
    in_head = (ranked.cumsum(-1) - ranked < 0.5).double()
    gap = (p - s).abs().gather(-1, order)
    w = (gap * in_head).sum(-1, keepdim=True) / gap.sum(-1, keepdim=True)
    reverse = s * (s.log() - p.log() - (s * (s.log() - p.log())).sum(-1, keepdim=True))
    z = z.requires_grad_()
    (grad,) = torch.autograd.grad(L.AKL().per_token(z, y, t).sum(), z)
    torch.testing.assert_close(grad, w * (s.detach() - p) + (1 - w) * reverse.detach())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_json_round_trip(spec: LossSpec) -> None:
    assert spec_from_dict("loss", spec.to_dict()) == spec


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_finite_for_extreme_logits(spec: LossSpec, sample: Any) -> None:
    z, y, t = (x.float() if x.is_floating_point() else x for x in sample)
    for scale in (1e-5, 20.0, 1e4):
        x = (z * scale).requires_grad_()
        value = seeded(spec, x, y, t * scale)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert value.isfinite().all()
        assert grad.isfinite().all()


NOT_INVARIANT = {"z_loss", "stablemax", "taylor_softmax", "sigsoftmax", "noisy_softmax"} | {
    "negative_sampling",
    "partial_fc",
    "hidden_mse",
}


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name not in NOT_INVARIANT], ids=str)
def test_a_common_offset_changes_nothing(spec: LossSpec, sample: Any) -> None:
    z, y, t = sample
    torch.testing.assert_close(
        seeded(spec, z + 1e4, y, t), seeded(spec, z, y, t), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("spec", [s for s in SPECS if isinstance(s, SummaryLoss)], ids=str)
def test_summary_losses_ask_for_what_they_read(spec: SummaryLoss, sample: Any) -> None:
    z, y, _ = sample
    numbers = summary(z, y, spec.needs)
    asked = {k: v for k, v in numbers.items() if k in spec.needs}
    torch.testing.assert_close(spec.from_summary(asked), spec.per_token(z, y, None))


def test_torch_agrees_where_it_has_the_loss(sample: Any) -> None:
    z, y, _ = sample
    pairs = [
        (L.CrossEntropy(), F.cross_entropy(z, y, reduction="none")),
        (L.LabelSmoothing(0.3), F.cross_entropy(z, y, reduction="none", label_smoothing=0.3)),
        (L.MultiMargin(0.5, 2), F.multi_margin_loss(z, y, p=2, margin=0.5, reduction="none")),
    ]
    for spec, expected in pairs:
        torch.testing.assert_close(spec.per_token(z, y, None), expected)


@pytest.mark.parametrize("name", [k for k in DEFINITIONS if k in {"sparsemax", "entmax15"}])
def test_fenchel_young_losses_are_zero_beyond_the_margin(name: str) -> None:
    margin = {"sparsemax": 1.0, "entmax15": 2.0}[name]
    z = torch.tensor([[0.0, margin, 0.0, -3.0]], requires_grad=True)
    value = spec_from_dict("loss", name).per_token(z, torch.tensor([1]), None)
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert value.abs() < 1e-6
    assert grad.abs().max() < 1e-6


def test_several_right_answers() -> None:
    z = torch.randn(3, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([[1, 4, -100], [2, -100, -100], [0, 5, 7]])
    got = L.DecoupledSoftmax().per_token(z, y, None)
    for i in range(3):
        right = [int(v) for v in y[i] if v >= 0]
        wrong = sum(math.exp(z[i, v]) for v in range(V) if v not in right)
        expected = -sum(math.log(math.exp(z[i, c]) / (math.exp(z[i, c]) + wrong)) for c in right)
        assert float(got[i]) == pytest.approx(expected / len(right), rel=1e-12)
    both = L.SoftTopK(k=3).per_token(z, y, None)
    alone = torch.stack([L.SoftTopK(k=3).per_token(z[:1], y[0, i : i + 1], None) for i in (0, 1)])
    torch.testing.assert_close(both[:1], alone.mean(0))


def test_noisy_softmax_lowers_the_label_by_its_angle(sample: Any) -> None:
    z, y, _ = sample
    norms = z.abs().amax(-1) * 1.5
    torch.manual_seed(3)
    got = L.NoisySoftmax(alpha=0.2).per_token(z, y, None, norms=norms)
    torch.manual_seed(3)
    noise = torch.randn(N, dtype=torch.float64).abs()
    for i in range(N):
        row = z[i].numpy().copy()
        cosine = row[y[i]] / float(norms[i])
        row[y[i]] -= 0.2 * float(norms[i]) * (1 - cosine) * float(noise[i])
        assert float(got[i]) == pytest.approx(cross_entropy(row, int(y[i])), rel=1e-9)


@pytest.mark.parametrize("distribution", ["uniform", "log_uniform"])
def test_draws_follow_their_stated_chance(distribution: Any) -> None:
    torch.manual_seed(0)
    ids = draw(200_000, 50, distribution, torch.device("cpu"))
    share = torch.bincount(ids, minlength=50) / len(ids)
    chance = log_chance(torch.arange(50), 50, distribution).exp()
    assert chance.sum() == pytest.approx(1, rel=1e-6)
    assert (share - chance).abs().max() < 5 * math.sqrt(0.25 / len(ids))


def test_sampled_softmax_by_hand(sample: Any) -> None:
    z, y, _ = sample
    spec = L.SampledSoftmax(samples=9, distribution="uniform")
    got = seeded(spec, z, y, z)
    torch.manual_seed(7)
    ids = spec.candidates(y, V).tolist()
    for i in range(N):
        label = int(y[i])
        count = 9 / V  # expected number of copies of a token
        others = sum(math.exp(z[i, v]) / count for v in ids if v != label)
        own = math.exp(z[i, label]) / count
        assert float(got[i]) == pytest.approx(-math.log(own / (own + others)), rel=1e-6)


def test_many_samples_give_the_exact_cross_entropy(sample: Any) -> None:
    z, y, _ = sample
    torch.manual_seed(0)
    spec = L.SampledSoftmax(samples=400_000, distribution="log_uniform")
    exact = L.CrossEntropy().per_token(z, y, None)
    q = spec.samples * log_chance(y, V, "log_uniform").exp()
    own = z.gather(-1, y[:, None])[:, 0]
    # the label itself is counted once with weight 1 / Q instead of 1
    corrected = torch.log((exact + own).exp() - own.exp() + own.exp() / q) - (own - q.log())
    torch.testing.assert_close(
        spec.per_token(z, y, None), corrected.to(z.dtype), rtol=2e-2, atol=2e-2
    )


def test_negative_sampling_by_hand(sample: Any) -> None:
    z, y, _ = sample
    spec = L.NegativeSampling(samples=5)
    got = seeded(spec, z, y, z)
    torch.manual_seed(7)
    ids = spec.candidates(y, V).tolist()
    for i in range(N):
        wrong = sum(math.log(1 + math.exp(z[i, v])) for v in ids if v != y[i])
        assert float(got[i]) == pytest.approx(math.log(1 + math.exp(-z[i, y[i]])) + wrong, rel=1e-9)


def test_partial_fc_over_everything_is_arcface(sample: Any) -> None:
    z, y, _ = sample
    cosines = torch.tanh(z) * 0.9
    got = L.PartialFC(rate=1.0, margin=0.4, scale=8.0).per_token(cosines, y, None)
    for i in range(N):
        row = 8 * cosines[i].numpy()
        angle = math.acos(cosines[i, y[i]])
        if angle < math.pi - 0.4:
            row[y[i]] = 8 * math.cos(angle + 0.4)
            assert float(got[i]) == pytest.approx(cross_entropy(row, int(y[i])), rel=1e-6)


def test_partial_fc_keeps_every_label(sample: Any) -> None:
    y = sample[1]
    spec = L.PartialFC(rate=0.01)
    assert isinstance(spec, SampledLoss)
    assert set(y.tolist()) <= set(spec.candidates(y, 1000).tolist())
    assert len(spec.candidates(y, 1000)) == 10


@pytest.mark.parametrize("spec", [s for s in SPECS if s.needs_teacher], ids=str)
def test_distillation_needs_a_teacher(spec: LossSpec, sample: Any) -> None:
    z, y, _ = sample
    with pytest.raises(ValueError, match="teacher"):
        spec.per_token(z, y, None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.LabelSmoothing(alpha=2.0), "from 0 to 1"),
        (lambda: L.KL(temperature=0.0), "positive"),
        (lambda: L.JSD(beta=1.0), "kl and reverse_kl"),
        (lambda: L.MultiMargin(power=3), "one of 1, 2"),
        (lambda: L.PartialFC(rate=0.0), "rate"),
        (lambda: L.SemanticSoftmax(levels=LEVELS, weights=(1.0,)), "2 levels and 1 weights"),
        (
            lambda: spec_from_dict("loss", {"name": "kl", "temprature": 2.0}),
            "did you mean 'temperature'",
        ),
        (lambda: spec_from_dict("loss", "cross_entrpy"), "did you mean 'cross_entropy'"),
    ],
)
def test_bad_fields_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_vocabulary_is_refused(sample: Any) -> None:
    z, y, _ = sample
    with pytest.raises(ValueError, match="12 tokens"):
        L.SoftTopK(k=V).per_token(z, y, None)
    with pytest.raises(ValueError, match="3 nodes for 12 tokens"):
        L.SemanticSoftmax(levels=((0, 0, 1),)).per_token(z, y, None)
