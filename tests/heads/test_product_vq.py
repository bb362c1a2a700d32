"""Product quantization against its definition."""

from __future__ import annotations

import pytest
import torch

from hf_softheads.heads import ProductVQ
from hf_softheads.heads.product_vq import _balanced_rotation
from tests.heads.conftest import Toy


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("codes", [16, 64])
def test_scores_are_sums_of_table_entries(rotate: bool, codes: int, toy: Toy) -> None:
    spec = ProductVQ(groups=4, codes=codes, rotate=rotate)
    head = spec.module(16, 256)
    spec.fit(head, toy.weight, None, toy.stats)
    x = toy.hidden if head.basis is None else toy.hidden @ head.basis.T
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
    dense = toy.hidden @ toy.weight.T
    errors = []
    for rotate, stats in ((True, toy.stats), (False, toy.stats), (False, None)):
        spec = ProductVQ(groups=4, codes=16, rotate=rotate)
        head = spec.module(16, 256)
        spec.fit(head, toy.weight, None, stats)
        errors.append(float((head(toy.hidden) - dense).log_softmax(-1).detach().var()))
        p = dense.softmax(-1)
        errors[-1] = float(
            (p * (dense.log_softmax(-1) - head(toy.hidden).log_softmax(-1))).sum(-1).mean().detach()
        )
    assert errors[0] < errors[1] < errors[2]


def test_rotation_is_orthogonal_and_balanced(toy: Toy) -> None:
    rotation = _balanced_rotation(toy.weight.double().T @ toy.weight.double() / 256, 4)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(16), rtol=1e-4, atol=1e-4)
    content = (toy.weight @ rotation).square().mean(0).log().view(4, 4).sum(1)
    plain = (toy.weight @ torch.linalg.eigh(toy.weight.T @ toy.weight)[1]).square().mean(0).log()
    assert content.std() < 0.2 * plain.view(4, 4).sum(1).std()


@pytest.mark.parametrize("groups", [0, 3, 17])
def test_refuses_groups_that_do_not_divide(groups: int) -> None:
    with pytest.raises(
        ValueError, match=f"asked for {groups} groups of 16 columns; they must divide"
    ):
        ProductVQ(groups=groups).check(16, 256)


@pytest.mark.parametrize("codes", [0, 1, 3, 100, 512])
def test_refuses_other_codebooks(codes: int) -> None:
    with pytest.raises(ValueError, match=f"asked for {codes} codes a group; a power of two from 2"):
        ProductVQ(groups=4, codes=codes).check(16, 256)
