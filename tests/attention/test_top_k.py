"""What `top_k` does with the keys outside the k largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_softheads.attention as sa


@pytest.mark.parametrize("rest", ["drop", "mean", "linear", "quadratic"])
def test_the_others_share_what_is_left(rest: Any) -> None:
    """Row by row, by the words of the docstring."""
    torch.manual_seed(0)
    scores = 2 * torch.randn(2, 3, 5, 12, dtype=torch.float64)
    keep = torch.rand(2, 1, 5, 12) < 0.8
    got = sa.TopK(k=4, rest=rest).weights(scores, keep, {})
    for b, h, q in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)):
        visible = keep[b, 0, q].nonzero().flatten()
        z = scores[b, h, q, visible]
        order = z.argsort(descending=True)
        top, others = order[:4], order[4:]
        p = z.softmax(0)
        want = torch.zeros_like(z)
        want[top] = z[top].softmax(0) if rest == "drop" else p[top]
        if rest != "drop":
            d = z[others] - z[others].mean()
            terms = {"mean": 1 + 0 * d, "linear": 1 + d, "quadratic": 1 + d + d**2 / 2}[rest]
            want[others] = (1 - p[top].sum()) * terms / terms.sum()
        torch.testing.assert_close(got[b, h, q, visible], want)


def test_an_even_row_keeps_its_values() -> None:
    """The head that dropping harms: scores within ±0.1 over 200 keys, of which 8 survive."""
    torch.manual_seed(0)
    scores = 0.2 * torch.rand(1, 1, 50, 200, dtype=torch.float64) - 0.1
    value = torch.randn(200, 8, dtype=torch.float64)
    keep = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    want = scores.softmax(-1) @ value

    def error(rest: Any) -> float:
        out = sa.TopK(k=8, rest=rest).weights(scores, keep, {}) @ value
        return float((out - want).abs().max())

    assert error("drop") > 0.5
    assert error("mean") < 0.05
    assert error("linear") < error("mean") / 10
    assert error("quadratic") < error("linear") / 10
