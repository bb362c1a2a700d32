"""Weighted k-means for the rows of an output matrix: 150,000 points, thousands of clusters, two cores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from hf_softheads.hardware import bf16_is_fast

_CHUNK_ELEMENTS = 2**24  # distances held at once: 64 MiB in fp32
_BLOCK_ELEMENTS = 2**22  # of points turned into fp32 at once
_PATIENCE = 2  # seconds before a bar is shown
_SEED_BLOCK = 256  # seeds kept at once, and at most 1/32 of those before
_SEED_TRIALS = 8  # candidates per seed


class Clusters(NamedTuple):
    """What `kmeans` found.

    Attributes:
        centers: weighted mean of each cluster's points, in the points' own coordinates, `(C, D)` fp32.
        labels: cluster of each point, `(N,)` int64; every cluster has at least one point.
        inertia: `Σ_i w_i ‖(x_i - center) metric‖²`.
    """

    centers: Tensor
    labels: Tensor
    inertia: float


class Rows:
    """Some rows of a matrix as points, gathered when they are asked for and never all at once."""

    def __init__(self, matrix: Tensor, which: Tensor):
        self.matrix, self.which = matrix, which
        self.shape = (len(which), matrix.shape[1])
        self.device = matrix.device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        return self.matrix[self.which[which]]


@torch.no_grad()
def kmeans(
    points: Tensor | Rows,
    clusters: int,
    *,
    weights: Tensor | None = None,
    metric: Tensor | None = None,
    iterations: int = 25,
    tolerance: float = 1e-3,
    seed: int = 0,
    description: str = "k-means",
) -> Clusters:
    """Minimise `Σ_i w_i ‖(x_i - c_label(i)) metric‖²` by Lloyd's algorithm, deterministic under `seed`.

    Seeding is greedy k-means++ (Arthur & Vassilvitskii 2007) in blocks, distances are matrix products in chunks of
    points, and an empty cluster takes the point that costs most. The iterations score a copy of the points, in bf16 on
    a CPU that has it; the last assignment and the means are those of the points themselves, in fp32.

    Args:
        points: `(N, D)`, any floating dtype, N ≥ clusters; a matrix or some `Rows` of one.
        weights: `(N,)`, ≥ 0.
        metric: `(D, M)`: distances are measured after multiplying by it, e.g. `E[h hᵀ]^{1/2}`.
        tolerance: stop when an iteration lowers the inertia by less than this fraction.

    Raises:
        ValueError: NaN or inf in the points or weights, a negative weight, or not `1 ≤ clusters ≤ N`.
    """
    count = len(points)
    if not 1 <= clusters <= count:
        raise ValueError(
            f"asked for {clusters} clusters of {count} points; 1 to {count} are possible"
        )
    require_finite(points, "points")
    weights = torch.ones(count, device=points.device) if weights is None else weights.float()
    if not bool((weights >= 0).all() & weights.isfinite().all()):
        raise ValueError("k-means weights must be finite and at least 0")
    space = _Space(points, metric)
    with tqdm(
        total=iterations + 1, desc=description, disable=None, leave=False, delay=_PATIENCE
    ) as bar:
        centers = points[_draw_seeds(space.scored, weights, clusters, seed)].float()
        bar.update()
        previous = float("inf")
        for _ in range(iterations):
            labels, cost = _assign(space, centers, weights)
            fill_empty(labels, cost, clusters)
            centers = weighted_means(points, labels, clusters, weights)
            inertia = float(cost.sum())
            bar.update()
            if previous - inertia < tolerance * inertia:
                break
            previous = inertia
    del space
    labels, cost = nearest(points, centers, metric=metric)
    cost *= weights
    fill_empty(labels, cost, clusters)
    return Clusters(weighted_means(points, labels, clusters, weights), labels, float(cost.sum()))


@torch.no_grad()
def nearest(
    points: Tensor | Rows, centers: Tensor, *, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Index of the nearest center of each point and its squared distance, `(N,)` both; arguments as in `kmeans`."""
    centers = centers.float()
    metric = None if metric is None else metric.float()
    centers = centers if metric is None else centers @ metric
    mean = centers.mean(0)  # smaller numbers, less cancellation
    centers = centers - mean
    half = centers.square().sum(1) / 2
    labels = torch.empty(len(points), dtype=torch.long, device=points.device)
    cost = torch.empty(len(points), device=points.device)
    for part in _parts(points, _CHUNK_ELEMENTS, max(centers.shape)):
        own = points[part].float() if metric is None else points[part].float() @ metric
        own = own - mean
        labels[part] = (own @ centers.T).sub_(half).max(1).indices
        cost[part] = (own - centers[labels[part]]).square().sum(1)
    return labels, cost


def weighted_means(points: Tensor | Rows, labels: Tensor, clusters: int, weights: Tensor) -> Tensor:
    """`Σ w_i x_i / Σ w_i` of each cluster, `(C, D)` fp32; the plain mean where all its weights are 0."""
    mass = torch.zeros(clusters, device=labels.device).index_add_(0, labels, weights)
    weights = torch.where(mass[labels] > 0, weights, torch.ones_like(weights))
    mass = torch.zeros(clusters, device=labels.device).index_add_(0, labels, weights)
    sums = torch.zeros(clusters, points.shape[1], device=labels.device)
    for part in _parts(points, _BLOCK_ELEMENTS):
        sums.index_add_(0, labels[part], points[part].float() * weights[part, None])
    return sums / mass.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def require_finite(matrix: Tensor | Rows, what: str) -> None:
    """Raise ValueError naming the first row of `matrix` that holds NaN or inf."""
    sums = torch.empty(len(matrix), device=matrix.device)
    for part in _parts(matrix, _BLOCK_ELEMENTS):
        sums[part] = matrix[part].float().sum(1)
    bad = (~sums.isfinite()).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(matrix)} {what} hold NaN or inf, the first is row {int(bad[0])}"
        )


class _Space:
    """A copy of `(points - mean) metric` to score by: the shift moves no point relative to another and makes numbers
    smaller. In bf16 on a CPU that multiplies it natively, else in fp32.
    """

    def __init__(self, points: Tensor | Rows, metric: Tensor | None):
        self.metric = None if metric is None else metric.to(points.device, torch.float32)
        self.mean = torch.zeros(points.shape[1], device=points.device)
        for part in _parts(points, _BLOCK_ELEMENTS):
            self.mean += points[part].float().sum(0) / len(points)
        width = points.shape[1] if metric is None else metric.shape[1]
        dtype = torch.bfloat16 if bf16_is_fast(points.device) else torch.float32
        self.scored = torch.empty(len(points), width, dtype=dtype, device=points.device)
        for part in _parts(points, _BLOCK_ELEMENTS):
            self.scored[part] = self.place(points[part])

    def place(self, points: Tensor) -> Tensor:
        """Where points lie in this space, fp32."""
        points = points.float() - self.mean
        return points if self.metric is None else points @ self.metric


def _parts(points: Tensor | Rows, elements: int, width: int | None = None) -> Iterator[slice]:
    """Slices of so many rows that `width` (default: their own) numbers for each are not more than `elements`."""
    rows = max(1, elements // max(1, width or points.shape[1]))
    for start in range(0, len(points), rows):
        yield slice(start, min(start + rows, len(points)))


def _assign(space: _Space, centers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest center of each point and the weighted squared distance to it, chunk by chunk."""
    scored, centers = space.scored, space.place(centers)
    labels = torch.empty(len(scored), dtype=torch.long, device=centers.device)
    cost = torch.empty(len(scored), device=centers.device)
    candidates = centers.to(scored.dtype).T
    half = centers.square().sum(1) / 2
    for part in _parts(scored, _CHUNK_ELEMENTS, max(centers.shape)):
        labels[part] = (scored[part] @ candidates).float().sub_(half).max(1).indices  # (chunk, C)
    for part in _parts(scored, _BLOCK_ELEMENTS):
        cost[part] = (scored[part].float() - centers[labels[part]]).square().sum(1)
    return labels, cost * weights


def _draw_seeds(scored: Tensor, weights: Tensor, clusters: int, seed: int) -> Tensor:
    """Indices of distinct points: candidates drawn with probability `w D²`, of which those are kept that gain most."""
    generator = torch.Generator().manual_seed(seed)
    norms = torch.empty(len(scored), device=scored.device)
    for part in _parts(scored, _BLOCK_ELEMENTS):
        norms[part] = scored[part].float().square().sum(1)
    chosen = torch.empty(0, dtype=torch.long, device=norms.device)
    distance = torch.full_like(norms, float(norms.max()) + 1)
    while len(chosen) < clusters:
        # powers of two: products of few shapes, each of which is compiled and kept
        block = min(1 << max(0, (len(chosen) // 32).bit_length() - 1), _SEED_BLOCK)
        block = min(block, clusters - len(chosen))
        noise = torch.empty(len(scored)).exponential_(generator=generator).to(norms.device)
        keys = distance * weights / noise  # the largest keys are a sample without replacement
        keys = torch.where(distance > 0, keys, -noise)  # only when nothing else is left
        keys[chosen] = -torch.inf
        fresh = keys.topk(min(_SEED_TRIALS * block, len(scored) - len(chosen))).indices
        gain = torch.zeros(len(fresh), device=norms.device)
        for part in _parts(scored, _CHUNK_ELEMENTS, max(scored.shape[1], len(fresh))):
            near = (scored[part] @ scored[fresh].T).float().mul_(2).sub_(norms[fresh])
            near.add_((distance[part] - norms[part])[:, None]).clamp_min_(0)
            gain += weights[part] @ near
        fresh = fresh[gain.topk(block).indices]
        chosen = torch.cat([chosen, fresh])
        for part in _parts(scored, _CHUNK_ELEMENTS, max(scored.shape[1], block)):
            near = (scored[part] @ scored[fresh].T).float().mul_(2).sub_(norms[fresh]).max(1).values
            distance[part] = torch.minimum(distance[part], norms[part] - near).clamp_min_(0)
        distance[fresh] = 0
    return chosen


def fill_empty(labels: Tensor, cost: Tensor, clusters: int) -> None:
    """Give each empty cluster the point that costs most and is not alone in its cluster, in place."""
    sizes = torch.bincount(labels, minlength=clusters).tolist()
    empty = [j for j, size in enumerate(sizes) if size == 0]
    if not empty:
        return
    for point in cost.argsort(descending=True).tolist():
        if sizes[int(labels[point])] > 1:
            sizes[int(labels[point])] -= 1
            labels[point] = empty.pop()
            cost[point] = 0
            if not empty:
                return
