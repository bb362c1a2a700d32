"""Discrete steps of a repair: they find known codes at fixed codebooks, are taken back, and leave a legal head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_softheads as sh
from hf_softheads.heads import ProductVQ, ResidualVQ
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.additive_codes import compose
from hf_softheads.training.distill_head import repair_head
from hf_softheads.training.pv_tuning import DiscreteSteps, Measured
from tests.conftest import make_model

V, D = 61, 16
SPECS: list[HeadSpec] = [ProductVQ(4, 8), ProductVQ(8, 8, "none"), ResidualVQ(2, 16)]


def scrambled(spec: HeadSpec) -> tuple[Any, Tensor, Tensor]:
    """A head with a neighbour of one code in a third of its rows, the matrix without that, and the right codes."""
    made = make_model("llama", vocab_size=V, hidden_size=D, tie_word_embeddings=False)
    torch.nn.init.normal_(made.lm_head.weight, std=1.0)
    model = sh.patch(made, head=spec)
    head = model.lm_head
    matrix, right = head.dense()[0].detach(), head.additive().codes
    wrong = right.clone()
    book = head.additive().books.detach()[1]
    near = torch.cdist(book, book).fill_diagonal_(torch.inf).argmin(1)
    wrong[::3, 1] = near[wrong[::3, 1]]
    head.store(wrong)
    return model, matrix, right


def rows() -> Tensor:
    return torch.randint(0, V, (40, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_finds_the_right_codes_at_fixed_codebooks(spec: HeadSpec) -> None:
    model, matrix, right = scrambled(spec)
    before = {k: v.clone() for k, v in model.lm_head.state_dict().items()}
    found = repair_head(model, matrix, rows(), steps=320, batch_size=64, lr=0.0)
    assert found.last < 0.5 * found.first
    codes = model.lm_head.additive().codes
    assert int((codes != right).sum()) < 0.5 * len(right[::3])
    after = model.lm_head.state_dict()
    assert all((v.shape, v.dtype) == (after[k].shape, after[k].dtype) for k, v in before.items())
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed
    assert all(k.startswith("codes") for k in changed)
    loaded = spec.module(D, V)
    loaded.load_state_dict(after)
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.eval()(h), model.lm_head(h))


def test_finds_the_same_codes_again() -> None:
    found = []
    for _ in range(2):
        model, matrix, _ = scrambled(SPECS[0])
        before = model.lm_head.additive().codes
        repair_head(model, matrix, rows(), steps=64, batch_size=64, lr=0.0)
        found.append(model.lm_head.additive().codes)
        assert not torch.equal(found[-1], before)
    assert torch.equal(*found)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_rate_for_codes_leaves_them(spec: HeadSpec) -> None:
    model, matrix, _ = scrambled(spec)
    before = model.lm_head.additive().codes
    repair_head(model, matrix, rows(), steps=60, batch_size=64, code_lr=0)
    assert torch.equal(model.lm_head.additive().codes, before)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_describes_its_own_rows(spec: HeadSpec) -> None:
    head = scrambled(spec)[0].lm_head.train()  # scored without kernels
    found = head.additive()
    width = D if found.basis is None else len(found.basis)
    matrix = compose(found.codes, found.books.detach(), found.parts, width)
    matrix = matrix if found.basis is None else matrix @ found.basis
    torch.testing.assert_close(matrix, head.dense()[0], rtol=1e-5, atol=1e-5)
    tokens = torch.randint(0, V, (5, 3), generator=torch.Generator().manual_seed(3))
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    expected = head(h)
    torch.testing.assert_close(head.score(h, tokens), expected.gather(1, tokens))
    torch.testing.assert_close(head.subset(h, tokens[0]), expected[:, tokens[0]])


def test_a_rising_loss_takes_the_step_back() -> None:
    model, matrix, right = scrambled(SPECS[0])
    head = model.lm_head
    head.store(right)
    losses = iter([1.0, 2.0, 1.5])  # before, with all proposals, with those that were kept

    def measure(hidden: Tensor, labels: Tensor) -> Measured:
        current = head.dense()[0].detach()
        return Measured(next(losses), current, -torch.ones_like(current))

    steps = DiscreteSteps(head, measure)
    steps.note(torch.randn(V, D, generator=torch.Generator().manual_seed(4)))
    hidden = torch.randn(64, D, generator=torch.Generator().manual_seed(5))
    assert steps.take(hidden, hidden, torch.zeros(64, dtype=torch.long)) == 0
    assert next(losses, None) is None
    assert torch.equal(head.additive().codes, right)
    torch.testing.assert_close(head.dense()[0].detach(), matrix)
