"""Accepting one of several drafts of a token, with the target's law."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_GRID = 20  # shares of the heaviest draft that are tried


class MultiDraft:
    """One token from `drafts` independent ones of another model, distributed as the target's (arXiv 2410.18234).

    `recursive` (SpecInfer) tries the drafts in turn against what is left of the target: `r ← (r - p)₊ / Σ`. `mix` takes
    the draft of largest `q / p` with a probability ℓ and else the first one, whose law `p_I` is known, and accepts it
    with `min(1, q / p_I)`, else draws from `(q - p_I)₊`. How often a draft is accepted is known in closed form for
    both; the better one is taken.

    Args:
        target, draft: probabilities `(V,)` of the target q and of the draft p.
        drafts: how many tokens are drawn from p.
        scheme: `best` of the two, or one of them.

    Attributes:
        scheme: the one taken.
        acceptance: probability that a draft is accepted.
        ceiling: the most that any scheme can reach, `min_S q(S) + 1 - p(S)^drafts`.

    Raises:
        ValueError: no probabilities of one vocabulary, fewer than one draft.
    """

    def __init__(
        self,
        target: Tensor,
        draft: Tensor,
        drafts: int,
        scheme: Literal["best", "recursive", "mix"] = "best",
    ):
        if target.ndim != 1 or target.shape != draft.shape:
            raise ValueError(
                "target and draft must be probabilities (V,) of one vocabulary, got shapes "
                f"{tuple(target.shape)} and {tuple(draft.shape)}"
            )
        if drafts < 1:
            raise ValueError(f"drafts must be at least 1, got {drafts}")
        self.target, self.draft = (
            _law(name, x) for name, x in (("target", target), ("draft", draft))
        )
        self.drafts = drafts
        ratio = torch.where(self.target > 0, self.target / self.draft, 0.0)
        order = ratio.argsort(stable=True)
        self.rank = torch.empty_like(order)
        self.rank[order] = torch.arange(len(order), device=order.device)
        upto = self.draft[order].cumsum(0).clamp_max(1)
        missing = self.target[order].cumsum(0) + 1 - upto**drafts
        self.ceiling = min(1.0, float(missing.min()))
        heaviest = torch.zeros_like(upto)
        heaviest[order] = (upto**drafts).diff(prepend=upto.new_zeros(1))
        shares = torch.linspace(0, 1, _GRID + 1, dtype=upto.dtype).tolist()
        mixtures = [(1 - share) * self.draft + share * heaviest for share in shares]
        accepted = [float(torch.minimum(self.target, law).sum()) for law in mixtures]
        best = max(range(len(shares)), key=accepted.__getitem__)
        self.share, self.chosen = shares[best], mixtures[best]
        self.residuals, recursive = self._recursive()
        if scheme == "best":
            scheme = "mix" if accepted[best] > recursive else "recursive"
        self.scheme = scheme
        self.acceptance = accepted[best] if scheme == "mix" else recursive

    def _recursive(self) -> tuple[list[Tensor], float]:
        """What is left of the target before each draft and at the end, and how often one is accepted."""
        left, refused = [self.target], 1.0
        for _ in range(self.drafts):
            rest = (left[-1] - self.draft).clamp_min(0)
            total = float(rest.sum())
            refused *= total
            left.append(rest / total if total > 0 else left[-1])
        return left, 1 - refused

    def __call__(
        self, tokens: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """From drafts `(N, drafts)` drawn from `draft`: tokens `(N,)` of the target's law, and which are drafts."""
        if tokens.ndim != 2 or tokens.shape[1] != self.drafts:
            raise ValueError(
                f"expected drafts of shape (N, {self.drafts}), got {tuple(tokens.shape)}"
            )
        if self.scheme == "mix":
            return self._mixed(tokens, generator)
        found = torch.full_like(tokens[:, 0], -1)
        for draft, left in zip(tokens.unbind(1), self.residuals, strict=False):
            u = self._uniform(tokens, generator)
            taken = (found < 0) & (u * self.draft[draft] < left[draft])
            found = torch.where(taken, draft, found)
        return self._or_else(found, self.residuals[-1], generator)

    def _mixed(self, tokens: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        heaviest = tokens.gather(1, self.rank[tokens].argmax(1, keepdim=True)).squeeze(1)
        which = self._uniform(tokens, generator) < self.share
        draft = torch.where(which, heaviest, tokens[:, 0])
        taken = self._uniform(tokens, generator) * self.chosen[draft] < self.target[draft]
        rest = (self.target - self.chosen).clamp_min(0)
        return self._or_else(torch.where(taken, draft, -1), rest, generator)

    def _uniform(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.rand(
            len(tokens), generator=generator, dtype=torch.float64, device=self.target.device
        )

    def _or_else(
        self, found: Tensor, rest: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        accepted = found >= 0
        missing = int((~accepted).sum())
        if missing:
            drawn = torch.multinomial(rest, missing, replacement=True, generator=generator)
            found = found.masked_scatter(~accepted, drawn)
        return found, accepted


def _law(name: str, x: Tensor) -> Tensor:
    law = x.double()
    if bool((law < 0).any()) or not abs(float(law.sum()) - 1) < 1e-3:
        raise ValueError(
            f"{name} must be probabilities, at least 0 and summing to 1; their sum is {float(law.sum()):.4g}"
        )
    return law / law.sum()
