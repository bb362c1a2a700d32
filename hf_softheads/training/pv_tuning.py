"""Discrete steps of `repair_head`: codes of a head whose rows are sums of codebook entries, by the loss itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.fit.additive_codes import best_moves, compose
from hf_softheads.heads.fit.blockwise import blocks, in_chunks
from hf_softheads.heads.forms.trainable_codes import Additive
from hf_softheads.heads.stats import softmax_curvature

EVERY = 20  # optimizer steps between two discrete ones
_STATES = 8192  # for the curvature
_DAMPING = 4.0  # of the curvature at first
_ADAPT = 1.25
_RIDGE = 1e-3


class Measured(NamedTuple):
    """The loss on some hidden states and its gradient `(V, D)` in the head's dense matrix."""

    loss: float
    matrix: Tensor
    gradient: Tensor


class DiscreteSteps:
    """PV-Tuning's discrete step (arXiv 2405.14852, section 3.2): at fixed codebooks a few codes change, one of a row.

    Proposed is the change of least `g · δ + ½ c λ_v δ M δᵀ`: g the mean gradient since the last time, `M = E[h hᵀ]`,
    `λ_v = E[q_v (1 - q_v)]` of the head's own probabilities, c the damping that sets the trust region. Proposals are
    tried together on other hidden states. A row keeps its own where its part of the change in loss,
    `½ (g before + g after) · δ`, is below zero; if the loss does not fall with those kept, all are taken back. The
    damping grows while less than half is kept, else it falls. Nothing is passed straight through.
    """

    def __init__(self, head: Any, measure: Callable[[Tensor, Tensor], Measured]):
        self.head, self.measure = head, measure
        self.damping = _DAMPING
        self.sum: Tensor | None = None
        self.count = 0
        self.share: Tensor | None = None
        self.moment: Tensor | None = None

    def note(self, gradient: Tensor) -> None:
        """Add the gradient `(V, D)` of an optimizer step."""
        self.sum = gradient.float().clone() if self.sum is None else self.sum.add_(gradient)
        self.count += 1

    @torch.no_grad()
    def take(self, states: Tensor, hidden: Tensor, labels: Tensor) -> int:
        """One step, judged on `hidden (n, D)` and the tokens that follow; how many codes changed.

        `states`: from which curvature and metric are taken, once.
        """
        found = self.head.additive()
        if found is None or self.sum is None:
            return 0
        if self.share is None or self.moment is None:
            self._look(states)
        codes = found.codes
        proposed = self._propose(found, self.sum / self.count)
        self.sum, self.count = None, 0
        changed = (proposed != codes).any(1)
        before = self.measure(hidden, labels)
        found.store(proposed)
        after = self.measure(hidden, labels)
        pays = ((before.gradient + after.gradient) * (after.matrix - before.matrix)).sum(1) < 0
        kept = torch.where((pays & changed)[:, None], proposed, codes)
        few = int((pays & changed).sum()) < 0.5 * int(changed.sum())
        self.damping *= _ADAPT if few else 1 / _ADAPT
        found.store(kept)
        if not self.measure(hidden, labels).loss < before.loss:
            found.store(codes)
            return 0
        return int((kept != codes).sum())

    def _propose(self, found: Additive, gradient: Tensor) -> Tensor:
        assert self.share is not None
        assert self.moment is not None
        basis, metric, books = found.basis, self.moment, found.books.detach().float()
        if basis is not None:
            basis = basis.detach().float()
            metric = basis @ metric @ basis.T
        proposed = torch.empty_like(found.codes)
        for which in blocks(len(gradient)):
            slope = gradient[which] if basis is None else gradient[which] @ basis.T
            slope = slope / (self.share[which] * self.damping)[:, None]
            proposed[which] = best_moves(found.codes[which], slope, books, found.parts, metric)[0]
        return proposed

    def _look(self, states: Tensor) -> None:
        """Metric and curvature of the head as it is."""
        found = self.head.additive()
        assert found is not None
        device = found.books.device
        h = states[torch.linspace(0, len(states) - 1, min(_STATES, len(states))).long()]
        h = h.to(device).float()
        self.moment = h.T @ h / len(h)
        self.moment.diagonal().add_(_RIDGE * self.moment.diagonal().mean())
        width = h.shape[1] if found.basis is None else len(found.basis)
        rows = compose(found.codes, found.books.detach().float(), found.parts, width)
        total = torch.zeros(len(rows), device=device)
        transform, bias = self.head.transform, getattr(self.head, "bias", None)
        for part in in_chunks(h, len(rows)):
            x = part if found.basis is None else part @ found.basis.detach().float().T
            scores = F.linear(x, rows, None if bias is None else bias.detach().float())
            p = (scores if transform is None else transform(scores)).softmax(-1)
            total += softmax_curvature(p).sum(0)
        self.share = total / len(h) * self.head.logit_scale**2
