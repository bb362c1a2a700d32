"""The metric in which errors of output rows matter: `E ‖(ŵ - w)·h‖² = (ŵ - w) E[h hᵀ] (ŵ - w)ᵀ`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.fit.blockwise import blocks, in_chunks, progress, scores_of
from hf_softheads.heads.fit.kmeans import Rows, kmeans

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_ROWS = 8192  # fitted at once
_COMPARED = 64  # rows by which a matrix is known again
_DAMPING = 1e-3  # of the mean variance, added to every direction: directions never seen still cost a little


def metric_root(stats: HeadStats, *, centred: bool = False) -> tuple[Tensor, Tensor]:
    """`R` and `R⁻¹`, `(D, D)` float64, with `R Rᵀ` = the damped `E[h hᵀ]`, or the covariance of h if `centred`.

    Columns of R are its principal directions, the strongest first. Centred is right for a head with a bias per
    token: the bias absorbs what a row's error does to the mean hidden state.
    """
    moment = (stats.covariance if centred else stats.second_moment).double()
    moment = (moment + moment.T) / 2
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    scale = (values + _DAMPING * values.mean().clamp_min(1e-30)).sqrt()
    return vectors * scale, (vectors / scale).T


def local_moments(stats: HeadStats, weight: Tensor, clusters: int = 32) -> tuple[Tensor, Tensor]:
    """The metric of each token's own contexts, one per cluster of tokens: labels `(V,)`, moments `(C, D, D)` float64.

    The error of row v costs `E[p_v (1 - p_v) (δ_v·h)²]`, so what counts is `E[h hᵀ]` where v is likely. Tokens are
    clustered by the hidden state at which they are likely; a moment is the mean over its tokens on `stats.states`,
    shrunk towards the global one as its effective number of states is small. Scaled to the global trace.

    Found once for these statistics and this matrix: `stats.contexts` keeps it.
    """
    sample = weight[:: max(1, len(weight) // _COMPARED)].detach().float().cpu()
    known, clusters = stats.contexts, min(clusters, len(weight))
    if not known or len(known["moments"]) != clusters or not torch.equal(known["of"], sample):
        labels, moments = _local_moments(stats, weight, clusters)
        known.update(of=sample, labels=labels.int().cpu(), moments=moments.cpu())
    # A copy: fits change it in place. fp32 would not stay positive definite beside directions of large variance.
    return known["labels"].long().to(weight.device), known["moments"].to(weight.device, copy=True)


@torch.no_grad()
def _local_moments(stats: HeadStats, weight: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    device = weight.device
    root, inverse = (r.to(device) for r in metric_root(stats))
    whole = root @ root.T
    labels = kmeans(
        stats.prob_weighted_mean.to(device),
        clusters,
        weights=stats.curvature.to(device),
        metric=inverse.T,
        description="contexts",
    ).labels
    member = F.one_hot(labels).float()
    states = stats.states.to(device)
    moments = torch.zeros(member.shape[1], *whole.shape, dtype=torch.float64, device=device)
    mass = torch.zeros(2, member.shape[1], dtype=torch.float64, device=device)
    parts = list(in_chunks(states, len(weight)))
    for h in progress(parts, "moments of contexts"):
        p = scores_of(h, weight).softmax(-1)
        share = (p.mul_(1 - p) @ member).double()  # (S, C)
        mass += torch.stack([share.sum(0), share.square().sum(0)])
        for cluster, moment in enumerate(moments):
            moment += (h.double() * share[:, cluster, None]).T @ h.double()
    effective = mass[0].square() / mass[1].clamp_min(
        1e-30
    )  # states that a moment was estimated from
    trust = effective / (effective + len(whole))
    for own, moment, t in zip(mass[0].clamp_min(1e-30), moments, trust, strict=True):
        moment.mul_(t / own).add_((1 - t) * whole)
        moment.mul_(whole.trace() / moment.trace())
    return labels, moments


def rows_by_moment(
    weight: Tensor | Rows, metrics: tuple[Tensor, Tensor] | None, description: str
) -> Iterable[tuple[Tensor, Tensor]]:
    """Each moment `(D, D)` and the rows it is for, `(n,)`, few enough to be held in fp32 several times; with a bar.

    `metrics`: as `local_moments` gives them; None for the plain metric.
    """
    vocab, dim = weight.shape
    if metrics is None:
        labels = torch.zeros(vocab, dtype=torch.long, device=weight.device)
        moments = torch.eye(dim, dtype=torch.float64, device=weight.device).unsqueeze(0)
    else:
        labels, moments = metrics
    parts = [
        (moment, mine)
        for cluster, moment in enumerate(moments)
        for mine in (labels == cluster).nonzero().flatten().split(_ROWS)
        if len(mine)
    ]
    return progress(parts, description)


@torch.no_grad()
def principal_directions(
    weight: Tensor,
    stats: HeadStats | None,
    rank: int,
    less: Callable[[slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`P (D, rank)`, `B (rank, D)`: `W P B` is the rank-r matrix of least expected squared logit error.

    The error is `Σ_v λ_v E[((ŵ_v - w_v)·h)²]`, `λ` the softmax curvature; without statistics all weights are 1 and
    the metric is plain, which is the truncated SVD of W. `less`: see `weighted_moment`.
    """
    share = torch.ones(len(weight), device=weight.device)
    root = inverse = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    if stats is not None:
        share = stats.curvature.to(weight.device)
        root, inverse = (r.to(weight.device) for r in metric_root(stats))
    moment = root.T @ weighted_moment(weight, share, less).double() @ root
    vectors = torch.linalg.eigh(moment)[1].flip(1)[:, :rank]
    return (root @ vectors).float(), (vectors.T @ inverse).float()


def weighted_moment(
    weight: Tensor, share: Tensor, less: Callable[[slice], Tensor] | None = None
) -> Tensor:
    """`Σ_v share_v w_v w_vᵀ / Σ share`, `(D, D)` fp32, a block of rows at a time.

    `less`: what is taken from some rows of `weight` before; broadcast to `(n, D)`.
    """
    total = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    for which in blocks(len(weight)):
        part = weight[which].float()
        part = part if less is None else part - less(which)
        total += (part * share[which, None]).T @ part
    return total / share.sum()
