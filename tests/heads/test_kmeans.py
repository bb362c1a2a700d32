"""k-means against its definition and against scikit-learn."""

from __future__ import annotations

import pytest
import torch

from hf_softheads.heads.fit import kmeans as module
from hf_softheads.heads.fit.kmeans import Rows, kmeans, nearest


def blobs(points: int, dim: int, centers: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centers, dim, generator=generator)
    which = torch.randint(centers, (points,), generator=generator)
    return middle[which] + 0.5 * torch.randn(points, dim, generator=generator)


@pytest.mark.parametrize("fast", [True, False])
def test_as_good_as_scikit_learn(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    monkeypatch.setattr(module, "bf16_is_fast", lambda device: fast)
    points = blobs(3000, 32, 200)
    theirs = cluster.KMeans(100, n_init=1, random_state=0).fit(points.numpy()).inertia_
    assert kmeans(points, 100).inertia < 1.03 * theirs


def test_inertia_and_centers_by_definition() -> None:
    points, weights = blobs(500, 8, 10), torch.rand(500, generator=torch.Generator().manual_seed(1))
    metric = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    found = kmeans(points, 12, weights=weights, metric=metric)
    for code in range(12):
        mine = found.labels == code
        mean = (weights[mine, None] * points[mine]).sum(0) / weights[mine].sum()
        torch.testing.assert_close(found.centers[code], mean, rtol=1e-4, atol=1e-5)
    cost = (weights * ((points - found.centers[found.labels]) @ metric).square().sum(1)).sum()
    assert found.inertia == pytest.approx(float(cost), rel=0.02)  # of the centers before the last


def test_metric_and_weights_matter() -> None:
    points, weights = blobs(2000, 8, 400), torch.logspace(0, -4, 2000)
    metric = torch.diag(torch.logspace(1, -1, 8))

    def cost(found: module.Clusters) -> float:
        error = (points - found.centers[found.labels]) @ metric
        return float((weights * error.square().sum(1)).sum())

    assert cost(kmeans(points, 50, weights=weights, metric=metric)) < 0.7 * cost(kmeans(points, 50))


def test_deterministic_under_seed() -> None:
    points = blobs(1000, 16, 100)
    first, again, other = (kmeans(points, 40, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.centers, again.centers)
    assert not torch.equal(first.labels, other.labels)


@pytest.mark.parametrize("distinct", [1, 3, 7])
def test_no_cluster_is_empty(distinct: int) -> None:
    points = blobs(distinct, 4, 3)[torch.arange(60) % distinct]
    found = kmeans(points, 20)
    assert (torch.bincount(found.labels, minlength=20) > 0).all()
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert found.centers.isfinite().all()


def test_points_of_weight_zero_keep_a_finite_center() -> None:
    found = kmeans(blobs(50, 4, 5), 20, weights=torch.zeros(50))
    assert found.centers.isfinite().all()
    assert (torch.bincount(found.labels, minlength=20) > 0).all()


def test_lossless_with_a_cluster_per_point() -> None:
    points = blobs(64, 4, 5)
    found = kmeans(points, 64)
    torch.testing.assert_close(found.centers[found.labels], points)


def test_nearest_agrees_with_cdist() -> None:
    points, centers = blobs(200, 6, 9), blobs(30, 6, 9, seed=1)
    metric = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    labels, cost = nearest(points, centers, metric=metric)
    distance = torch.cdist(points @ metric, centers @ metric)
    torch.testing.assert_close(cost, distance.min(1).values.square(), rtol=1e-3, atol=1e-4)
    assert torch.equal(labels, distance.argmin(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_the_first_bad_row(value: float) -> None:
    points = torch.ones(10, 3)
    points[4, 1] = value
    with pytest.raises(ValueError, match="1 of 10 points hold NaN or inf, the first is row 4"):
        kmeans(points, 2)


@pytest.mark.parametrize("clusters", [0, -1, 11])
def test_refuses_impossible_numbers(clusters: int) -> None:
    with pytest.raises(ValueError, match="1 to 10 are possible"):
        kmeans(torch.rand(10, 3), clusters)


def test_refuses_negative_weights() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        kmeans(torch.rand(10, 3), 2, weights=torch.full((10,), -1.0))


def test_rows_of_a_matrix_are_gathered_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, which = blobs(600, 4, 5), torch.arange(0, 600, 2)
    wanted = kmeans(matrix[which], 12)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 4 * 40)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 12 * 40)
    gathered = []

    class Watched(Rows):
        def __getitem__(self, some: slice | torch.Tensor) -> torch.Tensor:
            gathered.append(len(found := super().__getitem__(some)))
            return found

    found = kmeans(Watched(matrix, which), 12)
    assert torch.equal(found.labels, wanted.labels)
    torch.testing.assert_close(found.centers, wanted.centers)
    assert max(gathered) <= 40
