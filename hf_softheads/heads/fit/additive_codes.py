"""Rows that are sums of codebook entries: which entries a row takes, and where the entries lie.

`row_v = Σ_s books[s, codes[v, s]]`, entry s in the columns `parts[s]`: product and residual quantization alike. What
a row changes by, δ, costs `slope · δ + ½ δ metric δᵀ`. For a fit `slope = (row - wanted) metric`; for PV-Tuning's
discrete step (arXiv 2405.14852) the gradient over the curvature: the entry nearest to a row moved against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hf_softheads.heads.fit.blockwise import blocks

_SWEEPS = 2
_ROUNDING = 1e-6  # of the costs: no gain
_ROWS = 1024  # whose candidates stay in cache
_SPAN = 64  # columns
_DAMPING = 1e-4  # of a block's mean, where entries move


def compose(codes: Tensor, books: Tensor, parts: Sequence[slice], width: int) -> Tensor:
    """The rows `(n, K)` of codes `(n, S)`."""
    rows = torch.zeros(len(codes), width, device=books.device)
    for code, book, mine in zip(codes.T, books, parts, strict=True):
        rows[:, mine] += book[code]
    return rows


def recode(
    codes: Tensor, slope: Tensor, books: Tensor, parts: Sequence[slice], metric: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes of less cost, and that cost, `(n,)`, never above 0: one sweep of coordinate descent.

    Every part in turn takes the best of its entries, the others as they are.

    Args:
        codes: `(n, S)` int64; slope: `(n, K)`; books: `(S, C, w)`; metric: `(K, K)`, symmetric.
    """
    codes, slope = codes.clone(), slope.clone()
    cost = torch.zeros(len(codes), device=slope.device)
    for run in _runs(parts):
        inside = slice(parts[run[0]].start, parts[run[-1]].stop)
        first = inside.start
        moved = torch.zeros(len(codes), inside.stop - first, device=slope.device)
        for s in run:
            book, mine = books[s], parts[s]
            own = slice(mine.start - first, mine.stop - first)
            reach = book @ metric[mine, inside]  # what an entry adds to the slope
            for start in range(0, len(codes), _ROWS):
                at = slice(start, start + _ROWS)
                old = codes[at, s].clone()
                change, new = _best(old, slope[at, mine], book, reach[:, own])
                cost[at] += change
                codes[at, s] = new
                slope[at, inside] += reach[new] - reach[old]
                moved[at, own] += book[new] - book[old]
        _reach_beyond(slope, moved, inside, metric)
    return codes, cost


def _runs(parts: Sequence[slice]) -> list[list[int]]:
    """Parts side by side that have few columns together: the slope beyond these is brought up to date once a run."""
    runs: list[list[int]] = []
    for s, mine in enumerate(parts):
        if s and parts[s - 1].stop == mine.start and mine.stop - parts[runs[-1][0]].start <= _SPAN:
            runs[-1].append(s)
        else:
            runs.append([s])
    return runs


def _reach_beyond(slope: Tensor, moved: Tensor, inside: slice, metric: Tensor) -> None:
    for beyond in (slice(0, inside.start), slice(inside.stop, slope.shape[1])):
        slope[:, beyond] += moved @ metric[inside, beyond]


def best_moves(
    codes: Tensor, slope: Tensor, books: Tensor, parts: Sequence[slice], metric: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes with the one change in each row that lowers the cost most, and the cost, `(n,)`; arguments as `recode`."""
    least = torch.zeros(len(codes), device=slope.device)
    moved = codes.clone()
    for s, (book, mine) in enumerate(zip(books, parts, strict=True)):
        change, new = _best(codes[:, s], slope[:, mine], book, book @ metric[mine, mine])
        better = change < least
        least = torch.where(better, change, least)
        moved[better] = codes[better]
        moved[better, s] = new[better]
    return moved, least


def _best(old: Tensor, slope: Tensor, book: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Change in cost and the number of the best entry for each row; `within = book metric`, both in one part."""
    trial = torch.addmm((within * book).sum(-1) / 2, slope - within[old], book.T)
    least, new = trial.min(-1)
    before = trial.gather(1, old[:, None]).squeeze(1)
    gains = before - least > _ROUNDING * (before.abs() + least.abs())
    return (least - before).where(gains, 0), new.where(gains, old)


def recentre(
    codes: Tensor,
    slope: Tensor,
    books: Tensor,
    parts: Sequence[slice],
    metric: Tensor,
    share: Tensor,
) -> Tensor:
    """Codebooks of less `Σ_v share_v · cost_v`, part after part, at fixed codes; other arguments as `recode`."""
    books, slope = books.clone(), slope.clone()
    for run in _runs(parts):
        inside = slice(parts[run[0]].start, parts[run[-1]].stop)
        moved = torch.zeros(len(codes), inside.stop - inside.start, device=slope.device)
        for s in run:
            book, code, mine = books[s], codes[:, s], parts[s]
            mass = torch.zeros(len(book), device=slope.device).index_add_(0, code, share)
            pull = torch.zeros_like(book).index_add_(0, code, slope[:, mine] * share[:, None])
            pull /= mass.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            block = metric[mine, mine].clone()
            block.diagonal().add_(_DAMPING * block.diagonal().mean())
            move = -torch.linalg.solve(block, pull.T).T
            book += move
            slope[:, inside] += (move @ metric[mine, inside])[code]
            moved[:, mine.start - inside.start : mine.stop - inside.start] += move[code]
        _reach_beyond(slope, moved, inside, metric)
    return books


def refine_codes(
    codes: Tensor,
    books: Tensor,
    parts: Sequence[slice],
    wanted: Callable[[Tensor], Tensor],
    labels: Tensor,
    moments: Iterable[Tensor],
) -> None:
    """Two sweeps of `recode` for all rows in place, each in the metric of its label, a block of rows at a time.

    Args:
        codes: `(V, S)` of any integer type; wanted: row numbers to rows `(n, K)` fp32; labels: `(V,)`;
        moments: of each label, `(K, K)`.
    """
    for label, moment in enumerate(moments):
        metric = moment.float()
        mine = (labels == label).nonzero().flatten()
        for part in blocks(len(mine)):
            which = mine[part]
            points, code = wanted(which), codes[which].long()
            for _ in range(_SWEEPS):
                slope = (compose(code, books, parts, points.shape[1]) - points) @ metric
                code, _ = recode(code, slope, books, parts, metric)
            codes[which] = code.to(codes.dtype)
