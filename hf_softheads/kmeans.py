"""Weighted k-means for the rows of an output matrix: 150,000 points, thousands of clusters, two cores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

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


@torch.no_grad()
def kmeans(
    points: Tensor,
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
    points, and an empty cluster takes the point that costs most. On a CPU with native bf16 the iterations score in
    bf16; the last assignment is always fp32.

    Args:
        points: `(N, D)`, any floating dtype, N ≥ clusters.
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
        centers = space[_draw_seeds(space, weights, clusters, seed)]
        bar.update()
        previous = float("inf")
        for _ in range(iterations):
            labels, cost = _assign(space, centers, weights)
            fill_empty(labels, cost, clusters)
            centers = weighted_means(space, labels, clusters, weights)
            inertia = float(cost.sum())
            bar.update()
            if previous - inertia < tolerance * inertia:
                break
            previous = inertia
    labels, cost = _assign(space, centers, weights, exact=True)
    del space
    fill_empty(labels, cost, clusters)
    return Clusters(weighted_means(points, labels, clusters, weights), labels, float(cost.sum()))


@torch.no_grad()
def nearest(
    points: Tensor, centers: Tensor, *, metric: Tensor | None = None
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


def weighted_means(
    points: Tensor | _Space, labels: Tensor, clusters: int, weights: Tensor
) -> Tensor:
    """`Σ w_i x_i / Σ w_i` of each cluster, `(C, D)` fp32; the plain mean where all its weights are 0."""
    mass = torch.zeros(clusters, device=labels.device).index_add_(0, labels, weights)
    weights = torch.where(mass[labels] > 0, weights, torch.ones_like(weights))
    mass = torch.zeros(clusters, device=labels.device).index_add_(0, labels, weights)
    sums = torch.zeros(clusters, points.shape[1], device=labels.device)
    for part in _parts(points, _BLOCK_ELEMENTS):
        sums.index_add_(0, labels[part], points[part].float() * weights[part, None])
    return sums / mass.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def require_finite(matrix: Tensor, what: str) -> None:
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
    """`(points - mean) metric` in fp32: the shift moves no point relative to another and makes numbers smaller.

    On a CPU with native bf16 it is held as two bf16 numbers that add up to it, to 2⁻¹⁷ of its size; the first alone is
    what the iterations score. That is fp32's memory for both.
    """

    def __init__(self, points: Tensor, metric: Tensor | None):
        metric = None if metric is None else metric.to(points.device, torch.float32)
        self.shape = (len(points), points.shape[1] if metric is None else metric.shape[1])
        fast = bf16_is_fast(points.device)
        dtype = torch.bfloat16 if fast else torch.float32
        self.scored = torch.empty(self.shape, dtype=dtype, device=points.device)
        self.rest = torch.empty_like(self.scored) if fast else None
        total = torch.zeros(points.shape[1], device=points.device)
        for part in _parts(points, _BLOCK_ELEMENTS):
            total += points[part].float().sum(0)
        mean = total / len(points)
        for part in _parts(points, _BLOCK_ELEMENTS):
            block = points[part].float() - mean
            block = block if metric is None else block @ metric
            self.scored[part] = block
            if self.rest is not None:
                self.rest[part] = block - self.scored[part].float()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        found = self.scored[which].float()
        return found if self.rest is None else found + self.rest[which].float()


def _parts(points: Tensor | _Space, elements: int, width: int | None = None) -> Iterator[slice]:
    """Slices of so many rows that `width` (default: their own) numbers for each are not more than `elements`."""
    rows = max(1, elements // max(1, width or points.shape[1]))
    for start in range(0, len(points), rows):
        yield slice(start, min(start + rows, len(points)))


def _assign(
    space: _Space, centers: Tensor, weights: Tensor, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Nearest center of each point and the weighted squared distance to it, chunk by chunk."""
    labels = torch.empty(len(space), dtype=torch.long, device=centers.device)
    cost = torch.empty(len(space), device=centers.device)
    candidates = centers.T if exact else centers.to(space.scored.dtype).T
    half = centers.square().sum(1) / 2
    elements = _BLOCK_ELEMENTS if exact else _CHUNK_ELEMENTS
    for part in _parts(space, elements, max(centers.shape)):
        rows = space[part] if exact else space.scored[part]
        labels[part] = (rows @ candidates).float().sub_(half).max(1).indices  # (chunk, C)
    for part in _parts(space, _BLOCK_ELEMENTS):
        cost[part] = (space[part] - centers[labels[part]]).square().sum(1)
    return labels, cost * weights


def _draw_seeds(space: _Space, weights: Tensor, clusters: int, seed: int) -> Tensor:
    """Indices of distinct points: candidates drawn with probability `w D²`, of which those are kept that gain most."""
    generator = torch.Generator().manual_seed(seed)
    scored = space.scored
    norms = torch.empty(len(space), device=scored.device)
    for part in _parts(space, _BLOCK_ELEMENTS):
        norms[part] = space[part].square().sum(1)
    chosen = torch.empty(0, dtype=torch.long, device=norms.device)
    distance = torch.full_like(norms, float(norms.max()) + 1)
    while len(chosen) < clusters:
        block = min(max(1, len(chosen) // 32), _SEED_BLOCK, clusters - len(chosen))
        noise = torch.empty(len(space)).exponential_(generator=generator).to(norms.device)
        keys = distance * weights / noise  # the largest keys are a sample without replacement
        keys = torch.where(distance > 0, keys, -noise)  # only when nothing else is left
        keys[chosen] = -torch.inf
        fresh = keys.topk(min(_SEED_TRIALS * block, len(space) - len(chosen))).indices
        gain = torch.zeros(len(fresh), device=norms.device)
        for part in _parts(space, _CHUNK_ELEMENTS, max(space.shape[1], len(fresh))):
            near = (scored[part] @ scored[fresh].T).float().mul_(2).sub_(norms[fresh])
            near.add_((distance[part] - norms[part])[:, None]).clamp_min_(0)
            gain += weights[part] @ near
        fresh = fresh[gain.topk(block).indices]
        chosen = torch.cat([chosen, fresh])
        for part in _parts(space, _CHUNK_ELEMENTS, max(space.shape[1], block)):
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


def bf16_is_fast(device: torch.device) -> bool:
    """Whether this processor multiplies bf16 natively; emulated bf16 is slower than fp32."""
    probe = getattr(torch.cpu, "get_capabilities", None)
    found: dict[str, object] = probe() if probe else {}
    return device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))
