"""Screens that follow from frequencies alone: the frequency tier and the clusters of contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_softheads.heads import (
    Cascade,
    ContextScreen,
    FrequencyTier,
    Quantized,
    Screened,
    context_screen,
)
from hf_softheads.heads.base import HeadSpec
from hf_softheads.registry import spec_from_dict
from tests.heads.conftest import Toy, fit, fitted, kl, make_toy


def test_the_tier_is_exact_and_the_rest_shares_its_mass_as_ever(toy: Toy) -> None:
    head = fitted(FrequencyTier(64), toy)
    order = toy.stats.frequency.argsort(descending=True)
    tier, rest = order[:64], order[64:]
    dense, found = toy.hidden @ toy.weight.T, head(toy.hidden).detach()
    torch.testing.assert_close(found[:, tier], dense[:, tier], rtol=1e-4, atol=1e-4)
    within = found[:, rest].softmax(-1)
    mean = toy.stats.mean_prob[rest] / toy.stats.mean_prob[rest].sum()
    torch.testing.assert_close(within, mean.expand_as(within), rtol=1e-3, atol=1e-6)
    true, mine = (z.softmax(-1)[:, rest].sum(-1) for z in (dense, found))
    assert float(mine.mean()) == pytest.approx(float(true.mean()), rel=0.1)
    assert torch.corrcoef(torch.stack([true, mine]))[0, 1] > 0.7


def test_the_tail_follows_the_hidden_state(toy: Toy) -> None:
    head = fitted(FrequencyTier(64), toy)
    following = kl(head, toy)
    with torch.no_grad():
        rest = head.codes == 64  # type: ignore[operator]
        head.bias[rest] += float((toy.hidden @ head.weight[-1]).mean())  # type: ignore[index]
        head.weight[-1] = 0  # type: ignore[operator]
    assert following < 0.95 * kl(head, toy)


def test_coverage_is_that_of_text_left_out(toy: Toy) -> None:
    head = fitted(FrequencyTier(64), toy)
    text, greedy = head.coverage  # type: ignore[misc]
    order = toy.stats.frequency.argsort(descending=True)[:64]
    inside = torch.isin(toy.labels, order).double().mean()
    best = torch.isin((toy.hidden @ toy.weight.T).argmax(-1), order).double().mean()
    assert text == pytest.approx(float(inside), abs=0.05)
    assert greedy == pytest.approx(float(best), abs=0.05)
    assert f"{text:.1%}" in head.notes()[0]
    # a token that occurs in the left-out quarter only: not covered
    labels = torch.cat([torch.zeros(96, dtype=torch.long), torch.full((32,), 200)])
    stats = replace(
        toy.stats,
        labels=labels,
        states=toy.stats.states[:128],
        token_counts=torch.bincount(labels, minlength=256),
        mean_prob=torch.full((256,), 1 / 256),
    )
    spec = FrequencyTier(2)
    alone = spec.module(*toy.shape)
    spec.fit(alone, toy.weight, None, stats)
    assert int(alone.codes[200]) < 2
    assert alone.coverage is not None
    assert alone.coverage[0] == 0


def test_a_resized_tier_puts_new_tokens_in_the_tail(toy: Toy) -> None:
    head = fitted(FrequencyTier(64), toy)
    grown = head.resize(300)
    assert type(grown) is type(head)
    assert (grown.codes[256:] == 64).all()  # type: ignore[index]
    torch.testing.assert_close(grown(toy.hidden)[:, :256], head(toy.hidden))


@pytest.mark.parametrize("inner", [Quantized(8), Quantized(4)], ids=lambda s: f"{s.bits} bits")
def test_as_a_screen_the_tier_is_beaten_by_its_refinement(inner: HeadSpec, toy: Toy) -> None:
    few = replace(toy, hidden=toy.hidden[:512])
    alone = kl(fitted(FrequencyTier(32), toy), few)
    refined = kl(fit(Screened(FrequencyTier(32), 64, inner), toy), few)
    cascade = kl(fit(Cascade(FrequencyTier(32), 64, inner), toy), few)
    assert cascade < refined < 0.8 * alone


@pytest.mark.parametrize("screen", [FrequencyTier(32), ContextScreen(4, 8)], ids=lambda s: s.name)
def test_compositions_survive_json(screen: HeadSpec) -> None:
    spec = Screened(screen, 64, Quantized(4))
    assert spec_from_dict("head", spec.to_dict()) == spec


@pytest.mark.parametrize("tokens", [257, 1000])
def test_refuses_impossible_tiers(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"frequency_tier asked for {tokens} tokens; 1 to 256"):
        Screened(FrequencyTier(tokens), 8).check(16, 256)


@pytest.mark.parametrize(
    "spec",
    [FrequencyTier(8), ContextScreen(4, 8), Screened(ContextScreen(4, 8), 8)],
    ids=lambda s: s.name,
)
def test_needs_statistics(spec: HeadSpec, toy: Toy) -> None:
    head = spec.module(*toy.shape)
    with pytest.raises(ValueError, match=r"needs .*sh\.collect"):
        spec.fit(head, toy.weight, None, None)


def test_scores_are_the_cluster_s_probabilities(toy: Toy) -> None:
    head = fitted(ContextScreen(8, 40), toy)
    with torch.no_grad():
        found = head(toy.hidden).log_softmax(-1)
        which = head.cluster(toy.hidden)  # type: ignore[operator]
        dense = (toy.hidden @ toy.weight.T).softmax(-1)
    assert len(which.unique()) == 8
    for t in range(8):
        inside = found[which == t]
        torch.testing.assert_close(inside, inside[:1].expand_as(inside), rtol=1e-4, atol=1e-4)
        mean = dense[which == t].mean(0)
        gap = (inside[0].exp() - mean).abs().sum()
        assert gap < (dense.mean(0) - mean).abs().sum()
        best = set(head.ids[t].tolist())  # type: ignore[index]
        assert set(mean.topk(10).indices.tolist()) <= best
        assert len(best) == 40


def test_the_level_is_that_of_the_dense_head(toy: Toy) -> None:
    with torch.no_grad():
        found = fitted(ContextScreen(8, 40), toy)(toy.stats.states).logsumexp(-1)
    true = (toy.stats.states @ toy.weight.T).logsumexp(-1)
    assert float((found - true).mean()) == pytest.approx(0, abs=0.01)
    assert (found - true).var() < 0.85 * true.var()


def test_training_lowers_the_cross_entropy_of_other_states(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = kl(fit(ContextScreen(16, 64), toy), toy)
    monkeypatch.setattr(context_screen, "_train", lambda rows, *_: rows)
    assert trained < kl(fit(ContextScreen(16, 64), toy), toy)


def test_clusters_of_contexts_beat_one_set_for_all(toy: Toy) -> None:
    heads = [fit(Screened(ContextScreen(r, 24), 24), toy) for r in (1, 32)]
    one, many = (kl(head, toy) for head in heads)
    assert many < 0.8 * one
    coverage = [head.screen.coverage for head in heads]  # type: ignore[union-attr]
    greedy = (toy.hidden @ toy.weight.T).argmax(-1)
    for head, stated in zip(heads, coverage, strict=True):
        ids = head.screen.ids[head.screen.cluster(toy.hidden)]  # type: ignore[union-attr, operator, index]
        assert stated == pytest.approx(
            float((ids == greedy[:, None]).any(-1).float().mean()), abs=0.1
        )
    assert coverage[0] < coverage[1]
    assert heads[1].screen.bytes_read < heads[1].screen.nbytes / 2  # type: ignore[union-attr, operator]


def test_refuses_impossible_clusters() -> None:
    with pytest.raises(ValueError, match=r"context_screen asked for .* 1 to 256 are possible"):
        Screened(ContextScreen(4, 257), 8).check(16, 256)


def test_refuses_more_clusters_than_states(toy: Toy) -> None:
    few = replace(toy.stats, states=toy.stats.states[:64], labels=toy.stats.labels[:64])
    spec = ContextScreen(57, 8)
    with pytest.raises(ValueError, match="57 clusters, the statistics hold 64 hidden states of"):
        spec.fit(spec.module(*toy.shape), toy.weight, None, few)


@pytest.mark.parametrize(
    "spec",
    [Screened(Quantized(8), 12), Cascade(Quantized(8), 12, margin=3.0)],
    ids=lambda s: f"{s.name} by {s.screen.name}",
)
def test_samples_follow_the_dense_distribution(spec: Screened) -> None:
    """χ² of 40,000 draws, and the share of the tail, which has a tenth of the probability."""
    small = make_toy(48, 16)
    head = fit(spec, small)
    dense = (small.hidden @ small.weight.T).softmax(-1)
    flat = dense.topk(spec.candidates, -1).values.sum(-1).sub(0.9).abs().argmin()
    draws, expected = 40_000, dense[flat].double()
    generator = torch.Generator().manual_seed(3)
    found = head.sample(small.hidden[flat].expand(draws, -1), generator=generator)
    counts = torch.bincount(found, minlength=48).double()
    chi2 = float(((counts - draws * expected).square() / (draws * expected)).sum())
    tail = expected.argsort()[: 48 - spec.candidates]
    share = float(expected[tail].sum())
    assert share > 0.05
    assert abs(float(counts[tail].sum()) / draws - share) < 4 * (share * (1 - share) / draws) ** 0.5
    assert chi2 < 47 + 4 * (2 * 47) ** 0.5
