"""Top-k with as many tokens as a divergence is worth, and the probabilities that it asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_softheads.decoding.steps import Candidates

_HALVINGS = 60
_FEW = 64


class BregmanTopK(LogitsProcessor):
    """`p̂ = argmin D_φ(p̂, p) + penalty · ‖p̂‖₀` over distributions, `φ(x) = x^α / (α (α - 1))` (arXiv 2505.19371).

    `φ = x log x` at α = 1. Its support are the k best tokens, with the k of least cost, which is convex in k; `k=`
    fixes it. On them `p̂_i = (p_i^(α-1) + ν)^(1/(α-1))`, ν so that they sum to 1: α = 1 is top-k, above it small
    probabilities gain most. With `dual` the divergence is `D_φ(p, p̂)`. The scores that come out are `log p̂`, so what
    follows sees another distribution than that of the logits. Penalties of different α do not compare: over a Zipf
    distribution of 50,000 tokens 1e-3 keeps about 150 (α = 1), 30 (1.5), 15 (2).

    Raises:
        ValueError: α ≤ 0, or ≤ 1 with `dual`, where every dropped token costs infinitely much (α = 1 and a fixed k are
            fine); a penalty that is not above 0; k < 1.
    """

    needs_total = True

    def __init__(
        self, alpha: float = 1.5, penalty: float = 1e-3, dual: bool = False, k: int | None = None
    ):
        if not alpha > 0:
            raise ValueError(
                f"alpha must be above 0, got {alpha}; 1 is the Kullback-Leibler divergence"
            )
        if dual and (alpha < 1 or (alpha == 1 and k is None)):
            raise ValueError(
                f"the dual divergence with alpha={alpha} is infinite as soon as a token is dropped; take alpha "
                "above 1, dual=False, or alpha=1 with a fixed k"
            )
        if not penalty > 0:
            raise ValueError(
                f"penalty must be above 0, got {penalty}; without one every token stays"
            )
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.alpha, self.penalty, self.dual, self.k = alpha, penalty, dual, k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        z = scores.float()
        log_p = z.log_softmax(-1)
        vocab, count = z.shape[-1], min(max(_FEW, self.k or 1), z.shape[-1])
        while True:
            values, tokens = log_p.topk(count, -1)
            found = self._solve(values, count == vocab)
            if found is not None:
                none = torch.full_like(z, -torch.inf)
                return none.scatter(-1, tokens, found.float()).to(scores.dtype)
            count = min(4 * count, vocab)

    def on_candidates(self, input_ids: Tensor, found: Candidates) -> Candidates | None:
        log_p = found.logits - found.log_total().unsqueeze(-1)
        solved = self._solve(log_p, found.closed)
        if solved is None:
            return None
        nothing = torch.full_like(found.outside, -torch.inf)
        return Candidates(found.tokens, solved.float(), nothing)

    def _solve(self, log_p: Tensor, all_there: bool) -> Tensor | None:
        """`log p̂ (B, n)` of the n best tokens, by falling probability; None if k may be larger than n."""
        x = log_p.double().exp()
        possible = (x > 0).sum(-1).clamp_min(1)
        if self.k is not None:
            k = possible.clamp_max(self.k)
            enough = torch.full_like(k, x.shape[-1] >= self.k, dtype=torch.bool)
        else:
            k = self._best_count(x, possible)
            enough = k < x.shape[-1]
        if not all_there and not bool(enough.all()):
            return None
        best: Tensor = self.distribution(x, k).log()
        return best

    def _best_count(self, x: Tensor, possible: Tensor) -> Tensor:
        """The least k whose cost does not fall by one token more, `(B,)`: by bisection."""
        low, high = torch.ones_like(possible), possible
        while bool((low < high).any()):
            middle = (low + high) // 2
            falls = self.cost(x, (middle + 1).minimum(possible)) < self.cost(x, middle)
            low, high = torch.where(falls, middle + 1, low), torch.where(falls, high, middle)
            low = low.minimum(high)
        return low

    def cost(self, x: Tensor, k: Tensor) -> Tensor:
        """`D + penalty · k` less what it costs to keep no token, `(B,)`, with the k `(B,)` best of `x (B, n)`."""
        kept = torch.arange(x.shape[-1], device=x.device) < k.unsqueeze(-1)
        p = self.distribution(x, k)
        inner, dropped = self._divergence(p, x)
        total: Tensor = (inner - dropped).masked_fill(~kept, 0).sum(-1) + self.penalty * k
        return total

    def _divergence(self, p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each kept and of each dropped token."""
        a = self.alpha
        if a == 1:
            ratio = (p / x).log()
            return p * ratio - p + x if not self.dual else x * -ratio - x + p, x
        power = p**a / (a * (a - 1)), x**a / (a * (a - 1))
        if self.dual:
            return power[1] - power[0] - p ** (a - 1) / (a - 1) * (x - p), power[1]
        return power[0] - power[1] - x ** (a - 1) / (a - 1) * (p - x), x**a / a

    def distribution(self, x: Tensor, k: Tensor) -> Tensor:
        """`p̂ (B, n)` on the k `(B,)` best of `x (B, n)`, 0 elsewhere."""
        kept = torch.arange(x.shape[-1], device=x.device) < k.unsqueeze(-1)
        x = x.masked_fill(~kept, 0)
        a, total = self.alpha, x.sum(-1, keepdim=True)
        if a == 1:
            return x / total
        count, missing = k.unsqueeze(-1), 1 - total
        if a == 2:
            p = x + missing / count
        elif a == 1.5 and not self.dual:
            roots = x.sqrt().sum(-1, keepdim=True)
            p = (x.sqrt() + ((roots.square() + count * missing).sqrt() - roots) / count).square()
        else:
            p = self._by_bisection(x, kept)
        p = p.masked_fill(~kept, 0)
        return p / p.sum(-1, keepdim=True)

    def _by_bisection(self, x: Tensor, kept: Tensor) -> Tensor:
        a = self.alpha
        powers = x ** (a - 1)

        def primal(shift: Tensor) -> Tensor:
            return (powers + shift).clamp_min(0) ** (1 / (a - 1))

        def dual(shift: Tensor) -> Tensor:
            if a == 1.5:
                return ((shift + (shift.square() + 4 * x).sqrt()) / 2).square()

            def right(p: Tensor) -> Any:
                return p ** (a - 2) * (p - x) < shift

            return _root(x.clamp_min(1e-300), x + 2, right)

        given = dual if self.dual else primal
        low = torch.zeros_like(x[:, :1])
        high = torch.ones_like(low)
        if a < 1:  # the sum rises as the shift falls, to infinity at the largest probability
            low, high = low, -powers[:, :1]

        def right(shift: Tensor) -> Any:
            return given(shift).masked_fill(~kept, 0).sum(-1, keepdim=True) < 1

        return given(_root(low, high, right))


def _root(low: Tensor, high: Tensor, right: Any) -> Tensor:
    """Where `right(x)` turns from true to false on the way from low to high."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        go = right(middle)
        low, high = torch.where(go, middle, low), torch.where(go, high, middle)
    return low
