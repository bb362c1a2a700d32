"""Bit packing, rounding with error feedback, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_softheads.bitpack import PARTS, pack, pack_bits, unpack, unpack_bits
from hf_softheads.heads import Quantized
from hf_softheads.heads.fit.group_scales import refit_scales
from tests.heads.conftest import Toy, fit, kl


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_packing_is_lossless(width: int, count: int) -> None:
    values = torch.randint(2**width, (5, count), generator=torch.Generator().manual_seed(0))
    packed = pack(values, width)
    assert packed.shape == (5, -(-count * width // 8))
    assert torch.equal(unpack(packed, width, count).long(), values)


@pytest.mark.parametrize("bits", PARTS)
def test_cut_packing_is_lossless(bits: int) -> None:
    values = torch.randint(2**bits, (5, 13), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_bits(pack_bits(values, bits), bits, 13).long(), values)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 8])
def test_feedback_beats_rounding_on_logits(bits: int, group: int | None, toy: Toy) -> None:
    spec = Quantized(bits=bits, group=group)  # type: ignore[arg-type]
    errors = []
    for stats in (toy.stats, None):
        head = spec.module(16, 256)
        spec.fit(head, toy.weight, None, stats)
        error = head(toy.hidden) - toy.hidden @ toy.weight.T
        errors.append(float(error.detach().square().mean()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("columns", [None, 8])
def test_scales_are_best_for_their_codes(columns: int | None, toy: Toy) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(4, (256, 16), generator=generator) - 1.5
    moment = toy.stats.second_moment
    groups = 16 // (columns or 16)
    scales = torch.full((256, groups), 0.1)
    found = refit_scales(toy.weight, levels, scales, moment)

    def cost(scale: torch.Tensor) -> torch.Tensor:
        rows = levels * scale.repeat_interleave(16 // groups, 1)
        return (((rows - toy.weight).double() @ moment) * (rows - toy.weight)).sum(-1)

    free = (found != scales).all(1)  # some would not be positive
    assert free.float().mean() > 0.2
    for factor in (0.97, 1.03):  # a bf16 number may be 0.4 % off
        for group in range(groups):
            other = found.clone()
            other[:, group] *= factor
            assert (cost(other) >= cost(found) - 1e-3)[free].all()


def test_fits_beside_a_direction_of_large_variance(toy: Toy) -> None:
    """In fp32 its square would drown the others, and no metric be positive definite."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    mix = turn * torch.tensor([1e5, *[1.0] * 15], dtype=torch.float64)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        return x.double() @ mix.T

    stats = dataclasses.replace(
        toy.stats,
        states=mixed(toy.stats.states).float(),
        mean=mixed(toy.stats.mean),
        second_moment=mix @ toy.stats.second_moment @ mix.T,
        prob_weighted_mean=mixed(toy.stats.prob_weighted_mean).float(),
    )
    head = Quantized(4, group=4).module(16, 256)
    Quantized(4, group=4).fit(head, (toy.weight.double() @ mix.inverse()).float(), None, stats)
    assert head(mixed(toy.hidden).float()).isfinite().all()


def test_groups_are_64_columns_up_to_4_bits() -> None:
    assert [Quantized(bits).columns(576) for bits in (2, 3, 4, 5, 6, 8)] == [64] * 3 + [576] * 3
    assert (Quantized(4).columns(100), Quantized(4, None).columns(576)) == (100, 576)
    assert Quantized(4).module(128, 100).weight.shape == (100, 2)
    with pytest.raises(ValueError, match=r"quantized.group must be .*'auto'.*, got 'all'"):
        Quantized(group="all")  # type: ignore[arg-type]


def test_without_statistics_it_rounds_to_nearest(toy: Toy) -> None:
    head = Quantized(bits=8).module(16, 256)
    Quantized(bits=8).fit(head, toy.weight, None, None)
    rows = head.rows(slice(None))
    step = head.weight
    assert ((rows - toy.weight).abs() <= 0.51 * step).float().mean() > 0.99
    assert head.codes8.dtype == torch.uint8


def test_bytes_are_packed() -> None:
    head = Quantized(bits=3, group=16).module(64, 100).bfloat16()
    assert head.nbytes == 100 * 64 * 3 // 8 + 100 * 4 * 2


def test_scales_survive_bf16_exactly(toy: Toy) -> None:
    spec = Quantized(bits=4)
    head = spec.module(16, 256)
    spec.fit(head, toy.weight, None, toy.stats)
    assert torch.equal(head.weight, head.weight.bfloat16().float())


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16])
def test_refuses_other_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"must be one of 2, 3, 4, 5, 6, 8, got {bits}"):
        Quantized(bits=bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [5, 48])
def test_refuses_groups_that_do_not_divide(group: int) -> None:
    with pytest.raises(ValueError, match=f"groups of {group} of 64 columns; they must divide it"):
        Quantized(group=group).check(64, 256)


def test_frequent_rows_keep_eight_bits(toy: Toy) -> None:
    head = fit(Quantized(3, frequent=40), toy)
    frequent = toy.stats.frequency.argsort(descending=True, stable=True)[:40]
    assert torch.equal(head.token_of_row()[:40], frequent)
    error = (head.dense()[0] - toy.weight).square().mean(1)
    rest = torch.ones(256, dtype=torch.bool)
    rest[frequent] = False
    assert error[frequent].mean() < 0.01 * error[rest].mean()
    same = fit(Quantized(3), toy)
    torch.testing.assert_close(head.dense()[0][rest], same.dense()[0][rest])
    assert kl(head, toy) < 0.8 * kl(same, toy)
    codes = head.unpacked()
    head.pack(codes)
    assert torch.equal(head.unpacked(), codes)
    assert head.bytes.shape == (40, 16)


def test_frequent_rows_train_through_their_codes(toy: Toy) -> None:
    head = fit(Quantized(3, frequent=40), toy)
    before = head(toy.hidden)
    (latent,) = head.relax_codes()
    torch.testing.assert_close(head(toy.hidden), before)
    with torch.no_grad():
        latent[0] += 3.2  # of a frequent token, which has 256 codes
    trained = head(toy.hidden)
    head.round_codes()
    torch.testing.assert_close(head(toy.hidden), trained)
    token = int(head.token_of_row()[0])
    others = torch.arange(256) != token
    assert torch.equal(head(toy.hidden)[:, others], before[:, others])
    assert not torch.equal(head(toy.hidden)[:, token], before[:, token])


def test_refuses_more_frequent_tokens_than_there_are(toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"for 256 frequent tokens; 0 to 255 are possible"):
        Quantized(3, frequent=256).check(16, 256)
    with pytest.raises(ValueError, match=r"needs the token frequencies"):
        fit(Quantized(3, frequent=40), toy, stats=False)


@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 8), (8, None), (2, 4)])
def test_integer_levels(bits: int, group: int | None, toy: Toy) -> None:
    spec = Quantized(bits=bits, group=group, levels="integers")  # type: ignore[arg-type]
    head = spec.module(16, 256)
    spec.fit(head, toy.weight, None, toy.stats)
    rows = head.rows(slice(None)).detach().view(256, -1, head.group)
    codes = rows / head.weight.detach().unsqueeze(-1)
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    low, high = codes.round().aminmax()
    assert -(2 ** (bits - 1)) <= low < 0 < high < 2 ** (bits - 1)
    losses = []
    for levels in ("integers", "halves"):
        other = Quantized(bits=bits, group=group, levels=levels)  # type: ignore[arg-type]
        head = other.module(16, 256)
        other.fit(head, toy.weight, None, toy.stats)
        losses.append((head(toy.hidden) - toy.hidden @ toy.weight.T).square().mean().item())
    # of 4 levels, three with a 0 among them are worse than four around it
    assert losses[0] < {2: 3.0, 4: 1.5, 8: 1.2}[bits] * losses[1]


def test_integer_levels_need_codes_of_one_width() -> None:
    with pytest.raises(ValueError, match="levels='integers' with 8, 4 or 2 bits, got 3 bits"):
        Quantized(bits=3, levels="integers")
