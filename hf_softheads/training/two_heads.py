"""Divergences between two dense heads: a few numbers per token, found in blocks of the vocabulary of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_softheads.losses.base import Divergence, DivergenceLoss, Probabilities
from hf_softheads.training.token_chunks import Scorer, exp, exp_, widened


class Normaliser(NamedTuple):
    """`log Σ e^logit` as the largest logit and the rest, `(n, 1)` each: a large sum would be rounded."""

    top: Tensor
    rest: Tensor


class Divergences:
    """The distillation losses of one batch, during the walks over the blocks of both heads.

    The first walk finds the normalisers and both Kullback–Leibler divergences (`first`, then `finish`), a second one
    the sums of all other losses (`second`), and the last one the gradients. The teacher is dense and gets none.

    Args:
        losses: what is asked for, at any temperatures.
        teacher: its head.
        hidden: its hidden states `(n, Dt)`.
    """

    def __init__(self, losses: Sequence[DivergenceLoss], teacher: Scorer, hidden: Tensor):
        self.losses, self.teacher, self.hidden = losses, teacher, hidden
        self._running = {t: _Running(hidden) for t in {k.temperature for k in losses}}
        self._normalisers: dict[float, tuple[Normaliser, Normaliser]] = {}  # student's, teacher's
        self._sums: dict[DivergenceLoss, tuple[Tensor, ...]] = {}  # (n, 1) each

    @property
    def walks_again(self) -> bool:
        """Whether a second walk is needed before the gradients are."""
        return any(loss.equals is None for loss in self.losses)

    def block(self, start: int, stop: int) -> Tensor:
        """The teacher's scores of some tokens."""
        return self.teacher.block(self.hidden, start, stop)

    def first(self, rows: slice, student: Tensor, theirs: Tensor) -> None:
        """A tile of the student's logits and of the teacher's scores, for the first time."""
        teacher = self._logits(theirs)
        for temperature, running in self._running.items():
            running.add(rows, _over(student, temperature), _over(teacher, temperature))

    def finish(self) -> None:
        """The first walk has seen every token."""
        for temperature, running in self._running.items():
            self._normalisers[temperature] = running.normalisers()
        for loss in self.losses:
            if loss.equals is not None:
                self._sums[loss] = (self._running[loss.temperature].divergence(loss.equals),)

    def second(self, rows: slice, student: Tensor, theirs: Tensor) -> None:
        """The same tile once more."""
        teacher = self._logits(theirs)
        for loss in self.losses:
            if loss.equals is None:
                terms = loss.terms(*self._at(loss.temperature, rows, student, teacher))
                if loss not in self._sums:
                    zero = torch.zeros_like(self._normalisers[loss.temperature][0].top)
                    self._sums[loss] = tuple(zero.clone() for _ in terms)
                for total, term in zip(self._sums[loss], terms, strict=True):
                    total[rows] += term.sum(-1, keepdim=True)

    def values(self) -> dict[DivergenceLoss, Tensor]:
        """Every loss per token, `(n,)`."""
        return {
            loss: loss.from_sums(self._sums[loss]).squeeze(-1) * loss.temperature**2
            for loss in self.losses
        }

    def gradient(
        self, rows: slice, student: Tensor, theirs: Tensor, slope: Mapping[Any, Tensor]
    ) -> Tensor | None:
        """Of `Σ slope · loss` with respect to a tile of the student's logits; the slopes are `(n,)`, by loss."""
        teacher = self._logits(theirs)
        total: Tensor | None = None
        for loss in self.losses:
            if (factor := slope.get(loss)) is None:
                continue
            pair = self._at(loss.temperature, rows, student, teacher)
            sums = tuple(x[rows] for x in self._sums[loss])
            g = loss.gradient(*pair, sums)
            g.mul_(factor[rows].unsqueeze(-1) * loss.temperature)
            total = g if total is None else total.add_(g)
        return total

    def _logits(self, theirs: Tensor) -> Tensor:
        return self.teacher.transform(widened(theirs))

    def _at(
        self, temperature: float, rows: slice, *logits: Tensor
    ) -> tuple[Probabilities, Probabilities]:
        """Of student and teacher."""
        student, teacher = (
            (_over(z, temperature) - top[rows]).sub_(rest[rows])
            for z, (top, rest) in zip(logits, self._normalisers[temperature], strict=True)
        )
        return Probabilities(student, exp(student)), Probabilities(teacher, exp(teacher))


class _Running:
    """Sums over the tokens seen so far, `(n, 1)`: `Σ eᵃ`, `Σ eᵇ`, `Σ eᵃ (a − b)`, `Σ eᵇ (b − a)`.

    `a` and `b` are the student's and the teacher's logits less the largest ones so far, `top_a` and `top_b`.
    """

    def __init__(self, hidden: Tensor):
        zero = widened(hidden.new_zeros(len(hidden), 1))
        lowest = torch.full_like(zero, torch.finfo(zero.dtype).min)
        self.top_a, self.top_b = lowest, lowest.clone()
        self.sums = tuple(zero.clone() for _ in range(4))

    def add(self, rows: slice, a: Tensor, b: Tensor) -> None:
        """Logits `(rows, width)` each."""
        here_a, here_b = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
        a, b = a - here_a, b - here_b
        gap = a - b
        p, q = exp_(a), exp_(b)
        sum_a, sum_b = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        gap_a, gap_b = p.mul_(gap).sum(-1, keepdim=True), -q.mul_(gap).sum(-1, keepdim=True)
        top_a, top_b = self.top_a[rows], self.top_b[rows]
        high_a, high_b = torch.maximum(top_a, here_a), torch.maximum(top_b, here_b)
        before = _shifted(tuple(x[rows] for x in self.sums), top_a - high_a, top_b - high_b)
        here = _shifted((sum_a, sum_b, gap_a, gap_b), here_a - high_a, here_b - high_b)
        for total, x, y in zip(self.sums, before, here, strict=True):
            total[rows] = x + y
        self.top_a[rows], self.top_b[rows] = high_a, high_b

    def normalisers(self) -> tuple[Normaliser, Normaliser]:
        """Of student and teacher."""
        a, b = self.sums[:2]
        return Normaliser(self.top_a, a.log()), Normaliser(self.top_b, b.log())

    def divergence(self, which: Divergence) -> Tensor:
        sum_a, sum_b, gap_a, gap_b = self.sums
        ratio = sum_a.log() - sum_b.log()
        return gap_b / sum_b + ratio if which == "forward" else gap_a / sum_a - ratio


def _shifted(sums: tuple[Tensor, ...], da: Tensor, db: Tensor) -> tuple[Tensor, ...]:
    """The sums for logits `a + da` and `b + db`."""
    sum_a, sum_b, gap_a, gap_b = sums
    up_a, up_b, apart = da.exp(), db.exp(), da - db
    return (
        up_a * sum_a,
        up_b * sum_b,
        up_a * (gap_a + sum_a * apart),
        up_b * (gap_b - sum_b * apart),
    )


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature
