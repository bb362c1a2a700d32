"""Transform coding: byte budget, water-filling, rounding with feedback, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_softheads.heads import ProductVQ, Quantized, TransformCoded
from hf_softheads.heads.fit.bit_allocation import _ERROR, STEP, water_fill
from hf_softheads.heads.fit.gptq import coordinate_descent, round_with_feedback
from hf_softheads.heads.forms.bit_planes import read_codes
from tests.heads.conftest import Toy, fit, make_toy


@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_budget_is_kept_all_in(bits: float) -> None:
    toy = make_toy(512, 32)
    head = TransformCoded(bits=bits).module(32, 512)
    TransformCoded(bits=bits).fit(head, toy.weight, None, toy.stats)
    stored = head.bfloat16().nbytes * 8 / toy.weight.numel()
    assert bits - 0.01 < stored <= bits
    used = max(plane.stop for planes in head.planes() for plane in planes)
    assert 0.97 * len(head.codes) < used <= len(head.codes)


@pytest.mark.slow
def test_beats_equal_bits_at_equal_size() -> None:
    toy = make_toy(2048, 32, states=4096)
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)

    def kl(spec: TransformCoded | Quantized | ProductVQ) -> tuple[float, float]:
        head = spec.module(32, 2048)
        spec.fit(head, toy.weight, None, toy.stats)
        head = head.bfloat16().float()
        with torch.no_grad():
            mine = head(toy.hidden).log_softmax(-1)
        return float((dense.exp() * (dense - mine)).sum(-1).mean()), head.bfloat16().nbytes

    equal, size = kl(Quantized(bits=3))
    mine, my_size = kl(TransformCoded(bits=3.4))
    assert my_size < size
    assert mine < 0.7 * equal


def test_water_filling_is_optimal_on_a_small_case() -> None:
    energy = torch.tensor([[4.0, 1.0, 0.1]])
    found = water_fill(energy, [8], budget=5)  # 8 rows: a bit of a column is a byte

    def error(bits: tuple[int, ...]) -> float:
        return sum(float(e) * _ERROR[b] for e, b in zip(energy[0], bits, strict=True))

    best = min((b for b in itertools.product(range(6), repeat=3) if sum(b) <= 5), key=error)
    assert tuple(found[0].tolist()) == best


def test_quantizer_constants() -> None:
    points = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for bits in range(1, 9):
        step, last = STEP[bits], 2**bits - 1
        codes = (points / step + last / 2).round().clamp(0, last)
        error = float((step * (codes - last / 2) - points).square().mean())
        assert error == pytest.approx(_ERROR[bits], rel=0.05)


def test_feedback_lowers_the_quadratic_error() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 24, generator=generator)
    half = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    moment = half @ half.T + 0.1 * torch.eye(24, dtype=torch.float64)
    step, offset = torch.full((24,), 0.5), torch.full((24,), -1.75)
    last = torch.full((24,), 7.0)

    def error(metric: torch.Tensor) -> float:
        codes = round_with_feedback(values, step, offset, last, metric, torch.arange(24))
        delta = (offset + step * codes - values).double()
        return float((delta @ moment * delta).sum())

    assert error(moment) < 0.5 * error(torch.eye(24, dtype=torch.float64))


def test_coordinate_descent_ends_where_no_single_code_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 12, generator=generator)
    half = torch.randn(12, 5, generator=generator)
    moment = (half @ half.T + 0.1 * torch.eye(12)).double()
    step, offset, last = torch.full((12,), 0.5), torch.full((12,), -1.75), torch.full((12,), 7.0)
    settings = step, offset, last, moment, torch.randperm(12, generator=generator)
    start = torch.randint(8, (40, 12), generator=generator, dtype=torch.uint8)

    def cost(codes: torch.Tensor) -> torch.Tensor:
        delta = (offset + step * codes - values).double()
        return (delta @ moment * delta).sum(-1)

    once = coordinate_descent(start, values, *settings, sweeps=1)
    assert (cost(once) <= cost(start)).all()
    codes = coordinate_descent(start, values, *settings, sweeps=40, block=5)
    assert (cost(codes) <= cost(once) + 1e-6).all()
    for column in range(12):
        for code in range(8):
            other = codes.clone()
            other[:, column] = code
            assert (cost(other) >= cost(codes) - 1e-4).all()


def test_order_is_a_permutation_sorted_by_importance(toy: Toy) -> None:
    head = TransformCoded(bits=10.0, tiers=4).module(16, 256)
    TransformCoded(bits=10.0, tiers=4).fit(head, toy.weight, None, toy.stats)
    order = head.token_of_row()
    assert torch.equal(order.sort().values, torch.arange(256))
    importance = toy.stats.curvature[order]
    tiers = [importance[start:stop] for start, stop in head.ranges]
    assert all(a.min() >= b.max() for a, b in itertools.pairwise(tiers))
    places = head.row_of_token()
    assert places is not None
    assert torch.equal(order[places.long()], torch.arange(256))


def test_coordinates_are_exact_for_the_basis_as_stored(toy: Toy) -> None:
    """A basis of 4 bits loses nothing where the codes are fine: the coordinates are those for the rounded basis."""
    spec = TransformCoded(bits=10.0, tiers=1)
    head = spec.module(16, 256)
    spec.fit(head, toy.weight, None, toy.stats)
    assert head.basis.shape == (16, 8)
    error = (head(toy.hidden) - toy.hidden @ toy.weight.T).detach()
    spread = (toy.hidden @ toy.weight.T).std()
    assert (error - error.mean(1, keepdim=True)).std() < 0.01 * spread


def test_refuses_a_budget_below_its_tables() -> None:
    with pytest.raises(ValueError, match=r"asked for 0.1 bits per weight; its tables alone take"):
        TransformCoded(bits=0.1).check(64, 512)


def test_refuses_an_impossible_rank() -> None:
    with pytest.raises(ValueError, match="1 to 64 are possible"):
        TransformCoded(bits=4.0, rank=65).check(64, 512)


def test_refuses_impossible_tiers() -> None:
    with pytest.raises(ValueError, match="tiers must be from 1 to 16, got 17"):
        TransformCoded(bits=4.0, tiers=17)


@pytest.mark.parametrize("bits", [2.5, 4.0, 6.5])
def test_single_rows_are_those_of_the_blocks(toy: Toy, bits: float) -> None:
    head = fit(TransformCoded(bits=bits), toy)
    whole = torch.cat([head.rows(slice(*ends)) for ends in head.blocks()])
    some = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:200]
    assert torch.equal(head.rows(some), whole[some])
    head.relax_codes()
    assert torch.equal(head.rows(some), whole[some])


@pytest.mark.parametrize("bits", [2.5, 4.0, 6.5])
def test_codes_are_read_in_a_traced_program_too(toy: Toy, bits: float) -> None:
    head = fit(TransformCoded(bits=bits), toy)
    assert len(head.bits.unique()) > 1
    codes, some = head.unpacked(), torch.randperm(256, generator=torch.Generator().manual_seed(0))
    last = torch.tensor([stop for _, stop in head.ranges[:-1]])
    tier = torch.bucketize(some, last, right=True)
    found = read_codes(head.codes, head.bits, head.ranges, some, tier)
    assert torch.equal(found, codes[some])
    for t, (start, stop) in enumerate(head.ranges):
        rows = torch.arange(start, stop)
        found = read_codes(head.codes, head.bits, head.ranges, rows, t)
        assert torch.equal(found, codes[rows])
