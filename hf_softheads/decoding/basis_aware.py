"""Tokens below a threshold that the head's own basis proves to belong to the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from hf_softheads import bridge
from hf_softheads.decoding.top_n_sigma import kept_or_best
from hf_softheads.heads.base import Head
from hf_softheads.heads.dense import DenseHead
from hf_softheads.heads.forms.vq_module import VQHead

_INFEASIBLE = 2  # status of scipy.optimize.linprog


class BasisAware(LogitsProcessor):
    """Keeps `p_v ≥ η`, and of the rest the tokens that every true distribution must hold (arXiv 2310.01693).

    `η = min(ε, √ε · exp(-entropy))`, as in eta sampling. A head of few columns cannot tell distributions with the same
    `Eᵀq` apart, E its matrix; so a token is certified if no q has `Eᵀq = Eᵀp`, `0 ≤ q ≤ p / (1 - η)` and `q_v = 0`.
    With fewer columns of E more q are possible, so that certificates stay true. On a VQ head, whose tokens share rows,
    E has a row a code, and where these are affinely independent (no more codes than columns + 1) the answer is closed:
    `p_v > η · P(code of v)`. Otherwise a linear program a token by SciPy, seconds over a real vocabulary: for research.

    p is that of the scores it is given: put it before every other processor.

    Args:
        model: a model, a head, or a matrix `(V, D)`.
        epsilon: ε, above 0 and below 1.
        columns: of E, the leading right singular vectors of the matrix; a VQ head keeps all of its own.
        tested: how many tokens under the threshold are asked for, the likeliest; the closed form asks for all.

    Raises:
        ValueError: ε outside (0, 1), fewer than one column, a head without a matrix.
        ImportError: SciPy is needed and not installed.
    """

    def __init__(
        self,
        model: nn.Module | Tensor,
        epsilon: float = 0.015,
        *,
        columns: int = 20,
        tested: int = 8,
    ):
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must be above 0 and below 1, got {epsilon}")
        if columns < 1 or tested < 0:
            raise ValueError(
                f"columns must be at least 1 and tested at least 0, got {columns} and {tested}"
            )
        self.epsilon, self.tested = epsilon, tested
        head: Any = model if isinstance(model, Tensor | Head) else bridge.output_head(model)
        self.code_of: Tensor | None = None
        if isinstance(head, VQHead):
            self.code_of = head.codes.long()
            self.rows = head.weight.detach().double()
        else:
            self.rows = _leading(_matrix(head), columns)
        extended = torch.cat([self.rows, torch.ones_like(self.rows[:, :1])], 1)
        few = len(extended) <= extended.shape[1]
        self.closed = few and int(torch.linalg.matrix_rank(extended)) == len(extended)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = scores.double().log_softmax(-1)
        p = log_p.exp()
        entropy = -(p * log_p.clamp_min(-1e30)).sum(-1, keepdim=True)
        eta = (self.epsilon**0.5 * (-entropy).exp()).clamp_max(self.epsilon)
        keep = p >= eta
        mass = p if self.code_of is None else self._by_code(p)
        if self.closed:
            own = mass if self.code_of is None else mass[:, self.code_of]
            return kept_or_best(scores, keep | (p > eta * own))
        for row in range(len(p)):
            below = p[row].masked_fill(keep[row], 0).topk(min(self.tested, p.shape[-1])).indices
            for token in below[p[row][below] > 0].tolist():
                keep[row, token] |= self._certified(
                    mass[row], float(p[row, token]), token, float(eta[row])
                )
        return kept_or_best(scores, keep)

    def _by_code(self, p: Tensor) -> Tensor:
        assert self.code_of is not None
        return p.new_zeros(len(p), len(self.rows)).index_add(1, self.code_of, p)

    def _certified(self, mass: Tensor, p: float, token: int, eta: float) -> bool:
        """Whether no distribution over classes `(C,)` that the head takes for this one can do without a token."""
        try:
            from scipy.optimize import linprog
        except ImportError:
            raise ImportError(
                "BasisAware solves linear programs by SciPy for this head: pip install scipy; a VQ head of few codes "
                "needs none"
            ) from None
        code = token if self.code_of is None else int(self.code_of[token])
        most = mass.clone()
        most[code] -= p
        upper = (most.clamp_min(0) / (1 - eta)).tolist()
        ones = torch.ones_like(mass)
        equal = torch.cat([self.rows.to(mass), ones[:, None]], 1).T
        target = torch.cat([self.rows.to(mass).T @ mass, ones[:1]])
        found = linprog(
            [0.0] * len(mass),
            A_eq=equal.cpu().numpy(),
            b_eq=target.cpu().numpy(),
            bounds=[(0.0, value) for value in upper],
            method="highs",
        )
        return bool(found.status == _INFEASIBLE)


def _matrix(head: Any) -> Tensor:
    matrix: Tensor | None = head if isinstance(head, Tensor) else head.weight
    if isinstance(head, Head) and not isinstance(head, DenseHead):
        dense = head.dense()
        matrix = None if dense is None else dense[0]
    if matrix is None:
        raise ValueError(
            f"a {type(head).__name__} has no matrix (V, D), so it has no basis; give a matrix, or take another "
            "processor"
        )
    return matrix.detach()


def _leading(matrix: Tensor, columns: int) -> Tensor:
    """`(V, c)`: a matrix along its leading right singular vectors."""
    wide = matrix.double()
    vectors = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :columns]
    leading: Tensor = wide @ vectors
    return leading
