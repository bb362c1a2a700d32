"""Screens that follow from frequencies alone: the frequency tier and the clusters of contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_softheads.heads import Cascade, FrequencyTier, Quantized, Screened
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.registry import spec_from_dict
from tests.heads.conftest import Toy


def fitted(spec: HeadSpec, toy: Toy) -> Head:
    spec.check(*toy.shape)
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, toy.stats)
    return head


def divergence(head: Head, toy: Toy) -> float:
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)
    with torch.no_grad():
        mine = head(toy.hidden).float().log_softmax(-1)
    return float((dense.exp() * (dense - mine)).sum(-1).mean())


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
    following = divergence(head, toy)
    with torch.no_grad():
        rest = head.codes == 64  # type: ignore[operator]
        head.bias[rest] += float((toy.hidden @ head.weight[-1]).mean())  # type: ignore[index]
        head.weight[-1] = 0  # type: ignore[operator]
    assert following < 0.95 * divergence(head, toy)


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
    alone = divergence(fitted(FrequencyTier(32), toy), toy)
    refined = divergence(fitted(Screened(FrequencyTier(32), 64, inner), toy), toy)
    cascade = divergence(fitted(Cascade(FrequencyTier(32), 64, inner), toy), toy)
    assert cascade < refined < 0.8 * alone


def test_compositions_survive_json() -> None:
    spec = Screened(FrequencyTier(32), 64, Quantized(4))
    assert spec_from_dict("head", spec.to_dict()) == spec


@pytest.mark.parametrize("tokens", [0, 257])
def test_refuses_impossible_tiers(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"frequency_tier asked for {tokens} tokens; 1 to 256"):
        Screened(FrequencyTier(tokens), 8).check(16, 256)


@pytest.mark.parametrize("spec", [FrequencyTier(8)], ids=lambda s: s.name)
def test_needs_statistics(spec: HeadSpec, toy: Toy) -> None:
    head = spec.module(*toy.shape)
    with pytest.raises(ValueError, match=r"needs .*sh\.collect"):
        spec.fit(head, toy.weight, None, None)
