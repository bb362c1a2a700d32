"""The entmax package, where it does not crash, and where it does."""

from __future__ import annotations

from collections.abc import Callable

import entmax
import pytest
import torch
from torch import Tensor

import hf_softheads.attention as sa
from hf_softheads.attention import threshold
from hf_softheads.attention.base import AttentionSpec

MAPS: list[tuple[AttentionSpec, float, Callable[[Tensor], Tensor]]] = [
    (sa.Sparsemax(), 2.0, entmax.sparsemax),
    (sa.Entmax15(), 1.5, entmax.entmax15),
    (sa.Entmax(alpha=1.2), 1.2, lambda x: entmax.entmax_bisect(x, 1.2, n_iter=100)),
    (sa.Entmax(alpha=1.8), 1.8, lambda x: entmax.entmax_bisect(x, 1.8, n_iter=100)),
    (sa.Entmax(alpha=3.0), 3.0, lambda x: entmax.entmax_bisect(x, 3.0, n_iter=100)),
]
every_map = pytest.mark.parametrize(
    ("spec", "alpha", "theirs"), MAPS, ids=["2", "1.5", "1.2", "1.8", "3"]
)


@every_map
@pytest.mark.parametrize("scale", [1e-5, 0.1, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("keys", [1, 2, 252, 1021])
def test_values(
    spec: AttentionSpec, alpha: float, theirs: Callable[[Tensor], Tensor], scale: float, keys: int
) -> None:
    torch.manual_seed(0)
    scores = scale * torch.randn(1, 2, 5, keys, dtype=torch.float64)
    keep = torch.ones(5, keys, dtype=torch.bool)
    ours = spec.weights(scores, keep, {})
    assert (ours.sum(-1) - 1).abs().max() <= (1e-9 if alpha <= 2 else 1e-6)
    assert (ours - theirs(scores)).abs().max() <= (1e-7 if alpha <= 2 else 1e-6)


@every_map
def test_gradients(spec: AttentionSpec, alpha: float, theirs: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(1)
    scores = (2 * torch.randn(1, 2, 5, 40, dtype=torch.float64)).requires_grad_()
    grad = torch.randn(1, 2, 5, 40, dtype=torch.float64)
    keep = torch.ones(5, 40, dtype=torch.bool)
    (ours,) = torch.autograd.grad(spec.weights(scores, keep, {}), scores, grad)
    (wanted,) = torch.autograd.grad(theirs(scores), scores, grad)
    assert (ours - wanted).abs().max() <= 1e-5
    closed = spec.weights_vjp(scores, keep, {}, grad)[1]
    assert (closed - ours).abs().max() <= 1e-6
    # the Jacobian of α-entmax, row by row: diag(s) − s sᵀ / Σ s with s = w^(2 − α) on the support
    weights = spec.weights(scores, keep, {}).detach()
    for w, g, got in zip(*(x.flatten(0, 2) for x in (weights, grad, closed)), strict=True):
        s = torch.where(w > 0, w.clamp_min(1e-300) ** (2 - alpha), 0)
        jacobian = s.diag() - s.outer(s) / s.sum()
        assert (jacobian @ g - got).abs().max() <= (1e-9 if alpha <= 2 else 1e-6)


def test_the_gradient_of_a_learned_alpha() -> None:
    torch.manual_seed(2)
    scores = torch.randn(1, 2, 5, 30, dtype=torch.float64)
    grad = torch.randn_like(scores)
    keep = torch.ones(5, 30, dtype=torch.bool)
    alpha = torch.full((1, 2, 1, 1), 1.4, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(threshold.entmax(scores, keep, alpha), alpha, grad)
    bisected = entmax.entmax_bisect(scores, alpha, n_iter=100)
    (wanted,) = torch.autograd.grad(bisected, alpha, grad)
    assert (ours - wanted).abs().max() <= 1e-6


@every_map
def test_finite_where_the_package_crashes(
    spec: AttentionSpec, alpha: float, theirs: Callable[[Tensor], Tensor]
) -> None:
    """A row without a key raises (sort) or gives NaN (bisection) there; here it is 0."""
    scores = torch.randn(1, 1, 3, 6, generator=torch.Generator().manual_seed(3))
    keep = torch.ones(3, 6, dtype=torch.bool).index_fill(0, torch.tensor([1]), False)
    try:
        broken = not theirs(scores.masked_fill(~keep, -torch.inf)).isfinite().all()
    except (RuntimeError, IndexError):
        broken = True
    assert broken
    weights, dscores, _ = spec.weights_vjp(scores, keep, {}, torch.ones_like(scores))
    for tensor in (weights, dscores):
        assert tensor.isfinite().all()
        assert (tensor[:, :, 1] == 0).all()
    for row in (0, 2):  # the rows beside it are α-entmax: (α − 1) z − w^(α − 1) is one threshold τ
        w, z = weights[0, 0, row], scores[0, 0, row]
        assert float(w.sum()) == pytest.approx(1, abs=1e-5)
        tau = ((alpha - 1) * z - w ** (alpha - 1))[w > 0]
        assert (tau - tau[0]).abs().max() <= 1e-5
        assert ((alpha - 1) * z[w == 0] <= tau[0] + 1e-5).all()
