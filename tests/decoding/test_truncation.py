"""Truncation against definitions of its own: loops, enumeration, optimisation by SciPy."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

import hf_softheads as sh
from tests.clients.samples import patched

IDS = torch.zeros(3, 4, dtype=torch.long)


def some_logits(vocab: int = 40, rows: int = 3) -> Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("n", [0.3, 1.0, 2.0])
def test_top_n_sigma_by_its_definition(n):
    logits = some_logits()
    logits[1, 3:9] = -torch.inf  # banned tokens count nothing
    found = sh.decoding.TopNSigma(n)(IDS, logits)
    for row, out in zip(logits.double(), found, strict=True):
        finite = row[row.isfinite()]
        keep = row > finite.max() - n * np.std(finite.numpy(), ddof=1)
        assert torch.equal(out > -torch.inf, keep)
        assert torch.equal(out[keep].double(), row[keep])
    for temperature in (0.1, 10.0):
        again = sh.decoding.TopNSigma(n)(IDS, logits / temperature)
        assert torch.equal(again.isfinite(), found.isfinite())


def test_a_row_in_which_nothing_stands_out_keeps_its_best():
    flat = torch.zeros(2, 5)
    flat[1, :4] = -torch.inf
    found = sh.decoding.TopNSigma()(IDS[:2], flat)
    assert found.isfinite().sum(-1).tolist() == [1, 1]


def divergence(a: float, p: Any, q: Any) -> Any:
    """`D_φ(p, q)` summed, by its definition."""

    def phi(x: Any) -> Any:
        if a == 1:
            return np.where(x > 0, x * np.log(np.maximum(x, 1e-300)), 0)
        return x**a / (a * (a - 1))

    slope = np.log(q) + 1 if a == 1 else q ** (a - 1) / (a - 1)
    return (phi(p) - phi(q) - slope * (p - q)).sum()


def best_of_all(a: float, penalty: float, dual: bool, p: Any) -> tuple[float, Any]:
    """Least cost over all supports, each optimised by SciPy, and the distribution."""
    found = []
    for size in range(1, len(p) + 1):
        for support in combinations(range(len(p)), size):
            chosen = list(support)

            def cost(x: Any, chosen: list[int] = chosen) -> float:
                full = np.full(len(p), 0.0 if not dual else 1e-12)
                full[chosen] = np.maximum(x, 1e-12)
                return float(divergence(a, p, full) if dual else divergence(a, full, p))

            start = p[chosen] / p[chosen].sum()
            done = minimize(
                cost,
                start,
                bounds=[(1e-9, 1)] * size,
                constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
                options={"ftol": 1e-12},
            )
            full = np.zeros(len(p))
            full[chosen] = done.x
            found.append((float(done.fun) + penalty * size, full))
    return min(found, key=lambda pair: pair[0])


@pytest.mark.parametrize(
    ("alpha", "dual"),
    [
        (0.5, False),
        (1.0, False),
        (1.3, False),
        (1.5, False),
        (2.0, False),
        (1.5, True),
        (3.0, True),
    ],
)
def test_bregman_top_k_is_the_best_of_all_supports(alpha, dual):
    logits = some_logits(4, 2)
    logits[1] *= 0.2
    for penalty in (0.05,):
        processor = sh.decoding.BregmanTopK(alpha, penalty, dual)
        found = processor(IDS[:2], logits).double().exp().numpy()
        for row, p in zip(found, logits.double().softmax(-1).numpy(), strict=True):
            _, expected = best_of_all(alpha, penalty, dual, p)
            assert ((row > 0) == (expected > 0)).all()
            np.testing.assert_allclose(row, expected, atol=2e-4)
            assert abs(row.sum() - 1) < 1e-6


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_closed_forms_are_limits_of_the_bisection(alpha, dual):
    x = some_logits(12).double().softmax(-1).sort(-1, descending=True).values
    k = torch.tensor([2, 5, 9])
    exact, near = (
        sh.decoding.BregmanTopK(a, 0.1, dual).distribution(x, k) for a in (alpha, alpha + 1e-7)
    )
    torch.testing.assert_close(exact, near, atol=1e-6, rtol=1e-5)


def test_bregman_with_a_fixed_k_at_one_is_top_k():
    logits = some_logits()
    found = sh.decoding.BregmanTopK(1.0, k=4)(IDS, logits)
    kept = logits.masked_fill(logits < logits.topk(4, -1).values[:, -1:], -torch.inf)
    torch.testing.assert_close(found.exp(), kept.softmax(-1))


def test_bregman_grows_until_it_is_sure():
    logits = torch.linspace(1, 0, 700).expand(2, -1).contiguous()
    few = sh.decoding.BregmanTopK(1.5, 1e-7)(IDS[:2], logits)
    assert (few > -torch.inf).all()
    cut = sh.decoding.BregmanTopK(1.5, 3e-5)(IDS[:2], logits)
    assert 64 < int((cut[0] > -torch.inf).sum()) < 700


def test_bregman_on_candidates_of_a_head(tokens):
    """No warning: nothing asks for all logits; and the law is that of plain sampling."""
    model, draws = patched("quantized"), 500
    own = sh.decoding.BregmanTopK(1.5, 1e-2)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "logits_processor": [own]}
    plain = model.generate(
        tokens[:1, :3], return_dict_in_generate=True, output_scores=True, **options
    )
    law = plain.scores[0][0].softmax(-1)
    torch.manual_seed(1)
    found = model.generate(
        tokens[:1, :3].expand(draws, -1).contiguous(),
        custom_generate=sh.decoding.candidates,
        **options,
    )[:, -1]
    share = torch.bincount(found, minlength=len(law)) / draws
    assert share[law == 0].sum() == 0
    assert float((share - law).abs().sum()) < 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sh.decoding.TopNSigma(0), "n must be above 0, got 0"),
        (lambda: sh.decoding.TopNSigma(float("nan")), "n must be above 0"),
        (lambda: sh.decoding.BregmanTopK(0.0), "alpha must be above 0"),
        (lambda: sh.decoding.BregmanTopK(1.0, dual=True), "infinite as soon as a token is dropped"),
        (
            lambda: sh.decoding.BregmanTopK(0.5, dual=True, k=3),
            "infinite as soon as a token is dropped",
        ),
        (lambda: sh.decoding.BregmanTopK(penalty=0.0), "penalty must be above 0"),
        (lambda: sh.decoding.BregmanTopK(k=0), "k must be at least 1"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
