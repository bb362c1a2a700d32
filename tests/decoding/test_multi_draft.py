"""Multi-draft acceptance: the target's law, the closed forms, and the ceiling by a linear program."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import linprog
from torch import Tensor

import hf_softheads as sh

SCHEMES = ("recursive", "mix")


def laws(vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = (2 * torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(-1)
    draft = (target.log() + torch.randn(vocab, generator=generator, dtype=torch.float64)).softmax(
        -1
    )
    draft[1] = 0  # a token that the draft cannot give, and one that the target cannot
    target[2] = 0
    return target / target.sum(), draft / draft.sum()


@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_have_the_targets_law(scheme, drafts):
    target, draft = laws(12, drafts)
    draws, generator = 100_000, torch.Generator().manual_seed(0)
    rule = sh.decoding.MultiDraft(target, draft, drafts, scheme)
    drawn = torch.multinomial(draft, draws * drafts, replacement=True, generator=generator)
    tokens, accepted = rule(drawn.view(draws, drafts), generator)
    counts = torch.bincount(tokens, minlength=12).double()
    assert counts[2] == 0
    often = target * draws > 5
    expected = target[often] * counts[often].sum() / target[often].sum()
    assert stats.chisquare(counts[often], expected).pvalue > 1e-3
    share = float(accepted.double().mean())
    assert abs(share - rule.acceptance) < 5 * (0.25 / draws) ** 0.5
    assert rule.acceptance <= rule.ceiling + 1e-12


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_the_ceiling_is_that_of_the_linear_program(drafts):
    """Most of the target that can flow from sets of drafts to tokens that are among them."""
    target, draft = laws(4, 7)
    outcomes = list(product(range(4), repeat=drafts))
    edges = [(i, token) for i, outcome in enumerate(outcomes) for token in sorted(set(outcome))]
    mass = [float(np.prod([draft[t] for t in outcome])) for outcome in outcomes]
    rows = np.zeros((len(outcomes) + 4, len(edges)))
    for column, (i, token) in enumerate(edges):
        rows[i, column] = rows[len(outcomes) + token, column] = 1
    found = linprog([-1.0] * len(edges), A_ub=rows, b_ub=[*mass, *target.tolist()], method="highs")
    rule = sh.decoding.MultiDraft(target, draft, drafts)
    assert rule.ceiling == pytest.approx(-found.fun, abs=1e-9)
    if drafts == 1:  # ordinary speculative sampling is the best there is
        assert rule.acceptance == pytest.approx(rule.ceiling, abs=1e-12)


def test_the_better_scheme_is_taken():
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(400, generator=generator)
    draft = (target + 0.7 * torch.randn(400, generator=generator)).softmax(-1)
    found = {}
    for drafts in (2, 8):
        both = {
            s: sh.decoding.MultiDraft(target.softmax(-1), draft, drafts, s).acceptance
            for s in SCHEMES
        }
        best = sh.decoding.MultiDraft(target.softmax(-1), draft, drafts)
        assert best.acceptance == max(both.values())
        found[drafts] = best.scheme
    assert found == {2: "mix", 8: "recursive"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_greedy_target_gives_its_token(scheme):
    target = torch.zeros(9)
    target[4] = 1
    draft = torch.full((9,), 1 / 9)
    rule = sh.decoding.MultiDraft(target, draft, 2, scheme)
    drafts = torch.tensor([[0, 4], [4, 4], [1, 2], [4, 0]])
    tokens, accepted = rule(drafts, torch.Generator().manual_seed(0))
    assert tokens.tolist() == [4] * 4
    assert not accepted[2]


def test_what_is_refused():
    even = torch.full((4,), 0.25)
    with pytest.raises(ValueError, match="of one vocabulary"):
        sh.decoding.MultiDraft(even, torch.full((5,), 0.2), 2)
    with pytest.raises(ValueError, match="drafts must be at least 1, got 0"):
        sh.decoding.MultiDraft(even, even, 0)
    with pytest.raises(ValueError, match="draft must be probabilities"):
        sh.decoding.MultiDraft(even, 2 * even, 1)
    with pytest.raises(ValueError, match=r"expected drafts of shape \(N, 2\)"):
        sh.decoding.MultiDraft(even, even, 2)(torch.zeros(3, dtype=torch.long))
