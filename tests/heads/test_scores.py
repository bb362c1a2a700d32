"""Cosine, SVM, Fourier, draft and SDM heads against their formulas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_softheads as sh
from hf_softheads.heads import SDM, SVM, VQ, Cosine, Draft, Fourier
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.blockwise import best_scale
from hf_softheads.losses import MultiMargin
from tests.conftest import VOCAB, make_model
from tests.heads.conftest import Toy, fit, kl


def test_best_scale_is_where_the_divergence_is_least(toy: Toy) -> None:
    z = toy.hidden[:200] @ toy.weight.T

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for scores in z.split(64):
            yield scores / 3, (scores.softmax(-1) * scores / 3).sum(-1)

    assert best_scale(parts) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("lengths", ["none", "rows", "both"])
def test_cosine(lengths: str, toy: Toy) -> None:
    head = fit(Cosine(lengths), toy)  # type: ignore[arg-type]
    with torch.no_grad():
        head.weight.mul_(torch.rand(256, 1) + 0.5)  # directions alone count
        cosine = F.cosine_similarity(toy.hidden[:, None], toy.weight, dim=-1)
        expected = head.scale * cosine
        if lengths != "none":
            expected = expected * toy.weight.norm(dim=-1)
        if lengths == "both":
            expected = expected * toy.hidden.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(head(toy.hidden), expected, rtol=1e-3, atol=1e-3)
        some = torch.tensor([3, 200, 3])
        torch.testing.assert_close(head.subset(toy.hidden, some), head(toy.hidden)[:, some])


@pytest.mark.parametrize("lengths", ["none", "rows"])
def test_cosine_scale_is_the_best(lengths: str, toy: Toy) -> None:
    head = fit(Cosine(lengths), toy)  # type: ignore[arg-type]
    here = kl(head, toy)
    for factor in (0.8, 1.25):
        with torch.no_grad():
            head.scale.mul_(factor)
        assert kl(head, toy) > here
        with torch.no_grad():
            head.scale.div_(factor)
    assert "guess" in fit(Cosine(lengths), toy, stats=False).notes()[0]  # type: ignore[arg-type]


def test_svm_scale_has_the_least_hinge_loss(toy: Toy) -> None:
    head = fit(SVM(), toy)
    states, labels = toy.stats.states[:512], toy.stats.labels[:512]

    def hinge(factor: float) -> float:
        scores = factor * head(states).detach()
        return float(MultiMargin().per_token(scores, labels, None).mean())

    assert hinge(1.0) < min(hinge(0.9), hinge(1.1))
    assert torch.equal(head(toy.hidden).argmax(-1), (toy.hidden @ toy.weight.T).argmax(-1))
    assert "not fitted" in fit(SVM(inner=VQ(16)), toy, stats=False).notes()[0]


def test_svm_trains_with_margins() -> None:
    model = make_model("llama")
    tokens = torch.randint(3, 40, (8, 16), generator=torch.Generator().manual_seed(0))
    sh.patch(model, head=SVM(), stats=sh.collect(model, tokens))
    found = sh.repair_head(model, None, tokens, steps=30, lr=0.02, losses={MultiMargin(): 1.0})
    assert found.last < 0.7 * found.first


def ordinal_toy(toy: Toy) -> Toy:
    """A teacher with smooth probabilities over 256 bins."""
    places = (torch.arange(256) + 0.5) / 128 - 1
    waves = torch.stack([torch.cos(math.pi * k * places) for k in range(1, 6)], 1)
    weight = waves @ torch.randn(5, 16, generator=torch.Generator().manual_seed(3)) * 0.3
    return dataclasses.replace(toy, weight=weight)


def test_fourier_density_is_that_of_the_paper(toy: Toy) -> None:
    head = fit(Fourier(frequencies=4), toy, stats=False)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
        real, imaginary = (toy.hidden @ head.weight.T + head.shift).double().chunk(2, -1)
        a = torch.complex(real, imaginary)
        places = (torch.arange(256).double() + 0.5) / 128 - 1
        density = torch.full((len(a), 256), 0.5, dtype=torch.double)
        norm = a.abs().square().sum(-1)
        for k in range(1, 5):
            c = (a[:, :-k].conj() * a[:, k:]).sum(-1) / norm
            density += (c[:, None] * torch.exp(1j * math.pi * k * places)).real
        expected = density / density.sum(-1, keepdim=True) + 1e-5
        torch.testing.assert_close(
            head.density(toy.hidden).double(), expected, rtol=1e-3, atol=1e-6
        )


def test_fourier_fits_a_smooth_teacher(toy: Toy) -> None:
    smooth = ordinal_toy(toy)
    head = fit(Fourier(frequencies=8), smooth)
    flat = fit(Fourier(frequencies=8), smooth, stats=False)
    assert kl(head, smooth) < 0.3 * kl(flat, smooth)
    assert "flat" in flat.notes()[0]


def test_fourier_among_other_tokens(toy: Toy) -> None:
    smooth = ordinal_toy(toy)
    head = fit(Fourier(frequencies=6, start=6, stop=250), smooth)
    torch.testing.assert_close(head.rows[:-1], smooth.weight[head.others()], rtol=0, atol=0)
    assert head.others().tolist() == [0, 1, 2, 3, 4, 5, 250, 251, 252, 253, 254, 255]
    log_p = head(toy.hidden).log_softmax(-1)
    inside = head.density(toy.hidden).log().log_softmax(-1)
    found = log_p[:, 6:250].log_softmax(-1)
    torch.testing.assert_close(found, inside, rtol=1e-3, atol=1e-3)
    special = head(toy.hidden)[:, 252]
    torch.testing.assert_close(special, toy.hidden @ head.rows[8], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        Fourier(start=5, stop=6),
        Fourier(stop=300),
        Fourier(frequencies=300),
        Draft(257),
        SDM(exemplars=4, neighbours=8),
    ],
)
def test_refuses_impossible_fields(spec: HeadSpec) -> None:
    with pytest.raises(ValueError, match=f"{spec.name} asked for"):
        spec.check(16, 256)


def test_draft_keeps_the_frequent_tokens(toy: Toy) -> None:
    head = fit(Draft(40), toy)
    best = toy.stats.token_counts.topk(40)
    assert int(toy.stats.token_counts[head.ids.long()].min()) == int(best.values.min())
    assert head.coverage == pytest.approx(float(best.values.sum() / 2048), abs=1e-6)
    dense = toy.hidden @ toy.weight.T
    found = head(toy.hidden)
    kept = head.ids.long()
    torch.testing.assert_close(found[:, kept], dense[:, kept], rtol=1e-4, atol=1e-4)
    assert int(found.isinf().sum()) == len(found) * 216
    expected = found.log_softmax(-1).gather(1, toy.labels[:, None]).squeeze(1)
    torch.testing.assert_close(head.log_prob(toy.hidden, toy.labels), expected)
    assert head.log_prob(toy.hidden, toy.labels).isinf().any()
    assert torch.isin(head.sample(toy.hidden), kept).all()
    assert torch.equal(head.topk(toy.hidden, 3)[1], found.topk(3).indices)
    with pytest.raises(ValueError, match="needs the token frequencies"):
        fit(Draft(40), toy, stats=False)


def test_draft_assists_generation() -> None:
    target, small = make_model("llama"), make_model("llama", seed=1)
    target.generation_config.eos_token_id = small.generation_config.eos_token_id = None
    text = torch.randint(3, 30, (8, 16), generator=torch.Generator().manual_seed(0))
    sh.patch(small, head=Draft(24), stats=sh.collect(small, text))
    prompt = text[:1, :6]
    options = {"max_new_tokens": 12, "do_sample": False}
    alone = target.generate(prompt, **options)
    assert torch.equal(target.generate(prompt, assistant_model=small, **options), alone)
    drafted = small.generate(prompt, **options)[0, 6:]
    assert torch.isin(drafted, small.get_output_embeddings().ids).all()
    torch.manual_seed(0)
    sampled = target.generate(prompt, assistant_model=small, max_new_tokens=12, do_sample=True)
    assert sampled.shape[1] == 18
    assert int(sampled.max()) < VOCAB


def test_sdm_by_its_definition(toy: Toy) -> None:
    head = fit(SDM(exemplars=200, neighbours=6), toy)
    dense = toy.hidden @ toy.weight.T
    keys, labels = toy.stats.states[:200], toy.stats.labels[:200]
    guesses = (keys @ toy.weight.T).argmax(-1)
    calibration = torch.cdist(toy.stats.states[200:400], keys).min(-1).values
    found, log_p = head.evidence(toy.hidden[:50]), head(toy.hidden[:50]).detach()
    for i, h in enumerate(toy.hidden[:50]):
        distance = torch.cdist(h[None], keys)[0]
        q = 0
        for j in distance.argsort()[:6].tolist():
            if not guesses[j] == labels[j] == dense[i].argmax():
                break
            q += 1
        d = (int((calibration >= distance.min()).sum()) + 1) / 201
        assert int(found.similarity[i]) == q
        assert float(found.distance[i]) == pytest.approx(d, abs=0.006)
        expected = dense[i] * math.log(2 + q) * float(found.distance[i]) * head.weight.item()
        torch.testing.assert_close(log_p[i], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.token, dense[:50].argmax(-1))


def test_sdm_distrusts_what_is_far_away(toy: Toy) -> None:
    head = fit(SDM(exemplars=400), toy)
    near, far = head.evidence(toy.hidden), head.evidence(toy.hidden + 50)
    assert near.distance.mean() > 0.3
    assert far.distance.max() < 0.01
    assert far.probability.mean() < near.probability.mean()
    right = near.token == toy.labels
    assert near.similarity[right].float().mean() > near.similarity[~right].float().mean()


def test_sdm_needs_exemplars(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"needs 4096 hidden states, .* got 2048"):
        fit(SDM(), toy)
    with pytest.raises(ValueError, match="got none"):
        fit(SDM(), toy, stats=False)
