"""Product quantization against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_softheads.heads import ProductVQ
from hf_softheads.heads.fit.hadamard import random_signs, signed_hadamard
from hf_softheads.heads.product_vq import _balanced_rotation
from tests.heads.conftest import Toy, fit, kl, make_toy


@pytest.mark.parametrize("rotation", ["learned", "structured", "none"])
@pytest.mark.parametrize("codes", [16, 64])
def test_scores_are_sums_of_table_entries(rotation: Any, codes: int, toy: Toy) -> None:
    spec = ProductVQ(groups=4, codes=codes, rotation=rotation)
    head = spec.module(16, 256)
    spec.fit(head, toy.weight, None, toy.stats)
    x = head.prepare(toy.hidden)
    if rotation == "learned":
        torch.testing.assert_close(x, toy.hidden @ head.basis.T)
    table = torch.einsum("ngd,gcd->ngc", x.view(-1, 4, 4), head.weight)
    bits = codes.bit_length() - 1
    packed = torch.cat([p.long() for p in head.packed()], 1)
    assert packed.shape[1] == -(-4 * bits // 8)
    rows = head.rows(slice(None))
    index = torch.stack(
        [torch.cdist(rows.view(256, 4, 4)[:, g], head.weight[g]).argmin(1) for g in range(4)], 1
    )
    expected = sum(table[:, g, index[:, g]] for g in range(4))
    torch.testing.assert_close(head(toy.hidden), expected, rtol=1e-4, atol=1e-3)


def test_rotation_and_metric_help(toy: Toy) -> None:
    errors = []
    tried: list[tuple[Any, bool]] = [("learned", True), ("none", True), ("none", False)]
    for rotation, stats in tried:
        spec = ProductVQ(groups=4, codes=16, rotation=rotation)
        errors.append(kl(fit(spec, toy, stats=stats), toy))
    assert errors[0] < errors[1] < errors[2]


def test_rotation_is_orthogonal_and_balanced(toy: Toy) -> None:
    rotation = _balanced_rotation(toy.weight.double().T @ toy.weight.double() / 256, 4)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(16), rtol=1e-4, atol=1e-4)
    content = (toy.weight @ rotation).square().mean(0).log().view(4, 4).sum(1)
    plain = (toy.weight @ torch.linalg.eigh(toy.weight.T @ toy.weight)[1]).square().mean(0).log()
    assert content.std() < 0.2 * plain.view(4, 4).sum(1).std()


@pytest.mark.parametrize("groups", [3, 17])
def test_refuses_groups_that_do_not_divide(groups: int) -> None:
    with pytest.raises(
        ValueError, match=f"asked for {groups} groups of 16 columns; they must divide"
    ):
        ProductVQ(groups=groups).check(16, 256)


@pytest.mark.parametrize("codes", [3, 100])
def test_refuses_other_codebooks(codes: int) -> None:
    with pytest.raises(ValueError, match=f"asked for {codes} codes a group; a power of two from 2"):
        ProductVQ(groups=4, codes=codes).check(16, 256)


@pytest.mark.parametrize("dim", [1, 7, 16, 24, 96])
def test_hadamard_is_its_definition(dim: int) -> None:
    block = dim & -dim
    i = torch.arange(block)
    ones = sum(((i[:, None] & i) >> bit) & 1 for bit in range(8))
    matrix = (1 - 2 * (ones % 2)).double() / block**0.5  # (-1)^(bits that i and j share)
    signs = random_signs(dim, 3)
    values = torch.randn(5, dim, dtype=torch.float64)
    expected = torch.cat([part @ matrix for part in (values * signs).split(block, 1)], 1)
    torch.testing.assert_close(signed_hadamard(values, signs), expected)


def test_structured_rotation_gives_skewed_columns_their_share() -> None:
    toy = make_toy(256, 16)
    toy.weight[:, 4:].mul_(0.05)  # one group holds nearly everything
    losses = [
        kl(fit(ProductVQ(4, 16, rotation=rotation), toy, stats=False), toy)
        for rotation in ("structured", "none")
    ]
    assert losses[0] < losses[1]
    assert ProductVQ(4, 16, rotation="structured").module(16, 256).n_parameters == 4 * 16 * 4


def test_refuses_a_structured_rotation_that_turns_nothing() -> None:
    with pytest.raises(ValueError, match=r"structured rotation of 7 columns.*use learned or none"):
        ProductVQ(7, 16, "structured").check(7, 256)
