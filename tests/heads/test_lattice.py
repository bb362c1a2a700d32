"""The E8 codebook: its points, the nearest of them, and what they are better at than uniform grids."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_softheads.heads import Lattice, LowRank, Quantized, Screened, TransformCoded
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.lattice import _points, halves, nearest_points
from tests.heads.conftest import Toy, fit, kl, make_toy


def codebook() -> torch.Tensor:
    codes = torch.arange(2**16)
    return _points((codes >> 8).to(torch.uint8)[:, None], (codes & 255).to(torch.uint8)[:, None])


def test_codebook_is_a_shifted_lattice() -> None:
    assert halves().shape == (256, 8)
    assert int((halves().square().sum(1) <= 10).sum()) == 227  # as QuIP# counts them
    points = codebook()
    assert len(points.unique(dim=0)) == 2**16
    shift = torch.where(points[:, :1] % 1 == 0.25, -0.25, 0.25)
    bare = points - shift
    assert bool((bare % 1 == 0.5).all())
    assert bool((bare.sum(1) % 2 == 0).all())


def test_nearest_point_is_the_nearest() -> None:
    values = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * 1.5
    shape, sign = nearest_points(values)
    found = (_points(shape[:, None], sign[:, None]) - values).square().sum(1)
    least = torch.cdist(values, codebook()).square().amin(1)
    torch.testing.assert_close(found, least, rtol=1e-4, atol=1e-4)


def test_loses_less_than_a_uniform_grid_of_two_bits() -> None:
    toy = make_toy(256, 32)
    losses = [kl(fit(spec, toy), toy) for spec in (Lattice(), Quantized(2))]
    assert losses[0] < 0.9 * losses[1]


def test_refuses_what_eight_columns_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"8 columns at a time, which do not divide .* size 12"):
        Lattice().check(12, 64)
    with pytest.raises(ValueError, match="stages must be from 1 to 4, got 5"):
        Lattice(5)


@pytest.mark.parametrize(
    "inner", [Lattice(), TransformCoded(bits=4.0, tiers=2)], ids=["lattice", "coded"]
)
def test_gives_a_screen_its_exact_rows(inner: HeadSpec, toy: Toy) -> None:
    """Every head that scores single tokens can; its logits of the candidates are those it gives by itself."""
    few = replace(toy.stats, states=toy.stats.states[:512], labels=toy.stats.labels[:512])
    toy = replace(toy, stats=few)
    head, alone = fit(Screened(LowRank(8), 16, inner), toy), fit(inner, toy)
    hidden = toy.hidden[:256]
    alone.use_kernels("off")  # rows are scored in fp32
    with torch.no_grad():
        values, tokens = head.topk(hidden, 4)
        expected = alone.scores(hidden).gather(-1, tokens)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
