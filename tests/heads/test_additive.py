"""Sums of codebook entries: coordinate descent and codebooks against their definitions, and what they do for a fit."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hf_softheads.heads import ProductVQ
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.additive_codes import (
    best_moves,
    compose,
    recentre,
    recode,
    refine_codes,
)
from tests.heads.conftest import Toy, fit, kl

N, WIDTH, STAGES, CODES = 40, 6, 3, 4


class Problem(NamedTuple):
    codes: Tensor
    books: Tensor
    parts: list[slice]
    metric: Tensor
    wanted: Tensor

    def cost(self, codes: Tensor, books: Tensor) -> Tensor:
        delta = compose(codes, books, self.parts, WIDTH) - self.wanted
        return ((delta @ self.metric) * delta).sum(1) / 2

    def slope(self) -> Tensor:
        return (compose(self.codes, self.books, self.parts, WIDTH) - self.wanted) @ self.metric


@pytest.fixture(params=["product", "product in two runs", "residual"])
def problem(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Problem:
    if "runs" in request.param:
        monkeypatch.setattr("hf_softheads.heads.fit.additive_codes._SPAN", 4)
    monkeypatch.setattr("hf_softheads.heads.fit.additive_codes._ROWS", 16)
    generator = torch.Generator().manual_seed(0)
    each = WIDTH // STAGES
    parts = [slice(s * each, (s + 1) * each) for s in range(STAGES)]
    if request.param == "residual":
        parts, each = [slice(0, WIDTH)] * STAGES, WIDTH
    books = torch.randn(STAGES, CODES, each, generator=generator)
    codes = torch.randint(CODES, (N, STAGES), generator=generator)
    half = torch.randn(WIDTH, WIDTH, generator=generator)
    wanted = torch.randn(N, WIDTH, generator=generator)
    return Problem(codes, books, parts, half @ half.T, wanted)


def test_a_sweep_costs_what_it_says_and_ends_where_no_part_gains(problem: Problem) -> None:
    codes, books, parts, metric, _ = problem
    before = problem.cost(codes, books)
    new, change = recode(codes, problem.slope(), books, parts, metric)
    torch.testing.assert_close(problem.cost(new, books), before + change, rtol=1e-4, atol=1e-3)
    assert (change <= 0).all()
    for _ in range(20):
        problem = problem._replace(codes=new)
        new, change = recode(new, problem.slope(), books, parts, metric)
    assert torch.equal(new, problem.codes)
    assert (best_moves(new, problem.slope(), books, parts, metric)[1] > -1e-4).all()


def test_the_best_move_is_the_best_of_all_single_changes(problem: Problem) -> None:
    codes, books, parts, metric, _ = problem
    best = problem.cost(codes, books)
    for s, c in itertools.product(range(STAGES), range(CODES)):
        trial = codes.clone()
        trial[:, s] = c
        best = torch.minimum(best, problem.cost(trial, books))
    moved, change = best_moves(codes, problem.slope(), books, parts, metric)
    assert ((moved != codes).sum(1) <= 1).all()
    torch.testing.assert_close(problem.cost(moved, books), best, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(change, best - problem.cost(codes, books), rtol=1e-4, atol=1e-3)


def test_codebooks_reach_the_least_squares_solution(problem: Problem) -> None:
    codes, books, parts, metric, _ = problem
    share = torch.rand(N, generator=torch.Generator().manual_seed(1)) + 0.1
    costs = [float(problem.cost(codes, books) @ share)]
    for _ in range(200):
        problem = problem._replace(books=books)
        books = recentre(codes, problem.slope(), books, parts, metric, share)
        costs.append(float(problem.cost(codes, books) @ share))
    assert all(b <= a * 1.0001 for a, b in itertools.pairwise(costs))
    leaf = books.clone().requires_grad_()
    (problem.cost(codes, leaf) @ share).backward()
    assert leaf.grad is not None
    assert float(leaf.grad.abs().max()) < 0.02 * costs[0] / books.numel() ** 0.5


def test_settled_rows_are_nearer_in_their_own_metric(problem: Problem) -> None:
    codes, books, parts, metric, wanted = problem
    labels = torch.arange(N) % 2
    moments = torch.stack([metric, torch.eye(WIDTH)])
    small = codes.to(torch.uint8)
    refine_codes(small, books, parts, lambda which: wanted[which], labels, moments)
    for label, own in enumerate(moments):
        mine, trial = labels == label, problem._replace(metric=own)
        after = trial.cost(small.long(), books)[mine]
        assert after.sum() < 0.8 * trial.cost(codes, books)[mine].sum()


@pytest.mark.parametrize("spec", [ProductVQ(4, 16, "none"), ProductVQ(8, 16)])
def test_a_fit_beats_the_nearest_entry_part_by_part(
    spec: HeadSpec, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined = kl(fit(spec, toy), toy)
    monkeypatch.setattr("hf_softheads.heads.product_vq._refine", lambda *_: None)
    assert refined < kl(fit(spec, toy), toy)
