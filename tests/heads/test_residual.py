"""Low rank, low rank plus codes, and residual quantization against simpler definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hf_softheads.heads import LowRank, LowRankResidual, Quantized, ResidualVQ, Screened
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.residual_vq import _beam_search
from tests.heads.conftest import Toy, fit
from tests.heads.conftest import kl as divergence


def kl(spec: HeadSpec, toy: Toy, *, stats: bool = True) -> float:
    return divergence(fit(spec, toy, stats=stats), toy)


def test_low_rank_without_statistics_is_the_truncated_svd(toy: Toy) -> None:
    head = LowRank(rank=5).module(16, 256)
    LowRank(rank=5).fit(head, toy.weight, None, None)
    u, s, v = torch.linalg.svd(toy.weight, full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ v[:5]
    torch.testing.assert_close(head.weight @ head.down, expected, rtol=1e-3, atol=1e-3)


def test_low_rank_minimises_the_weighted_logit_error(toy: Toy) -> None:
    root = toy.stats.curvature.sqrt()[:, None]

    def error(stats: bool) -> float:
        head = LowRank(rank=6).module(16, 256)
        LowRank(rank=6).fit(head, toy.weight, None, toy.stats if stats else None)
        delta = (head.weight @ head.down - toy.weight) * root
        return float(((delta @ toy.stats.second_moment.float()) * delta).sum().detach())

    assert error(True) < 0.9 * error(False)
    assert kl(LowRank(rank=6), toy) < kl(LowRank(rank=6), toy, stats=False)


def test_low_rank_rows_may_be_stored_compactly(toy: Toy) -> None:
    bias = torch.linspace(-2, 2, 256)
    heads = []
    for spec in (LowRank(6), LowRank(6, Quantized(8))):
        heads.append(spec.module(16, 256, bias=True))
        spec.fit(heads[-1], toy.weight, bias, toy.stats)
    plain, coded = heads
    exact = plain(toy.hidden)
    assert (coded(toy.hidden) - exact).std() < 0.01 * exact.std()
    tokens = torch.arange(12).view(2, 6)
    mine = coded.score(toy.hidden[:2], tokens)
    torch.testing.assert_close(mine, coded(toy.hidden[:2]).gather(1, tokens))
    torch.testing.assert_close(
        coded.subset(toy.hidden[:2], tokens[0]), coded(toy.hidden[:2])[:, :6]
    )
    matrix, offset = coded.dense()
    torch.testing.assert_close(toy.hidden @ matrix.T + offset, coded(toy.hidden), rtol=0, atol=1e-4)
    assert kl(LowRank(6, Quantized(4)), toy) < kl(LowRank(6, Quantized(4)), toy, stats=False)
    assert kl(LowRank(6, Quantized(4)), toy) < 1.3 * kl(LowRank(6), toy)


def test_both_parts_beat_either(toy: Toy) -> None:
    both = kl(LowRankResidual(rank=3, bits=2), toy)
    assert both < 0.7 * kl(Quantized(bits=2), toy)
    assert both < 0.7 * kl(LowRank(rank=3), toy)


def _sum(books: Tensor, codes: Tensor) -> Tensor:
    return torch.stack([book[codes[:, s]] for s, book in enumerate(books)]).sum(0)


def test_beam_search_finds_the_best_sum_when_wide_enough() -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(3, 4, 5, generator=generator)
    points = torch.randn(20, 5, generator=generator)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    best = every[torch.cdist(points, _sum(books, every)).argmin(1)]
    assert torch.equal(_beam_search(points, books, beam=64), best)
    greedy = (points - _sum(books, _beam_search(points, books, beam=1))).square().sum()
    wide = (points - _sum(books, _beam_search(points, books, beam=4))).square().sum()
    assert wide < greedy


def test_scores_equal_those_of_the_rebuilt_rows(toy: Toy) -> None:
    spec = ResidualVQ(stages=3, codes=16)
    head = spec.module(16, 256)
    spec.fit(head, toy.weight, None, toy.stats)
    expected = toy.hidden @ head.rows(slice(None)).T
    torch.testing.assert_close(head(toy.hidden), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "spec",
    [
        LowRank(rank=17),
        LowRank(4, Quantized(8, group=3)),
        LowRank(4, Screened(LowRank(5), 8)),
        LowRankResidual(rank=17),
        LowRankResidual(group=5),
        ResidualVQ(codes=500),
    ],
)
def test_refuses_impossible_fields(spec: HeadSpec) -> None:
    with pytest.raises(ValueError, match="asked for"):
        spec.check(16, 256)
