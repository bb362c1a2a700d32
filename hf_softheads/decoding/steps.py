"""The best tokens of a decoding step, and processors that need no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The best tokens of each row, and what is known of all others.

    Attributes:
        tokens: `(B, K)` ids.
        logits: `(B, K)` fp32, falling; -inf for a token that has been dropped.
        outside: `(B,)`: no other token's logit is larger; -inf where all others have been dropped.
        total: `(B,)` `log Σ exp` of all logits, if it is known.
    """

    tokens: Tensor
    logits: Tensor
    outside: Tensor
    total: Tensor | None = None

    @property
    def closed(self) -> bool:
        """Whether no other token is left."""
        return bool((self.outside == -torch.inf).all())

    def log_total(self) -> Tensor:
        """`total`, of what is left where all others have been dropped.

        Raises:
            ValueError: it isn't known.
        """
        if self.total is not None:
            return self.total
        if not self.closed:
            raise ValueError("the normaliser of these candidates is not known")
        return self.logits.logsumexp(-1)

    def replaced(self, logits: Tensor) -> Candidates:
        """With other logits, put in order."""
        logits, order = logits.sort(stable=True, dim=-1, descending=True)
        return Candidates(self.tokens.gather(-1, order), logits, self.outside)

    def kept(self, mask: Tensor) -> Candidates:
        """Only the candidates of a mask `(B, K)`, and no other token; the best one where that would be none."""
        mask = mask & (self.logits > -torch.inf)
        mask[:, 0] |= ~mask.any(-1)
        logits = self.logits.masked_fill(~mask, -torch.inf)
        return Candidates(self.tokens, logits, torch.full_like(self.outside, -torch.inf))

    def surely_above(self, threshold: Tensor) -> bool:
        """Whether every token of at least `threshold (B,)` is among the candidates."""
        return bool(((self.outside < threshold) | (self.outside == -torch.inf)).all())


class Step(Protocol):
    """A processor on candidates; None where it needs more of them to be sure."""

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates | None: ...


@dataclass(frozen=True)
class Scale:
    """`logits / temperature`."""

    temperature: float

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates:
        return Candidates(
            found.tokens, found.logits / self.temperature, found.outside / self.temperature
        )


@dataclass(frozen=True)
class TopK:
    """The `k` best and those equal to the last of them."""

    k: int

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates | None:
        count = found.logits.shape[-1]
        if self.k > count and not found.closed:
            return None
        last = found.logits[:, min(self.k, count) - 1]
        if not found.surely_above(last):
            return None
        return found.kept(found.logits >= last[:, None])


@dataclass(frozen=True)
class MinP:
    """Tokens of at least `share` of the best one's probability; the `least` best at least."""

    share: float
    least: int

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates | None:
        cut = math.log(self.share) if self.share > 0 else -torch.inf
        threshold = found.logits[:, :1] + cut
        if not _reaches(found, threshold, self.least):
            return None
        mask = found.logits >= threshold
        mask[:, : self.least] = True
        return found.kept(mask)


@dataclass(frozen=True)
class Epsilon:
    """Tokens of at least this probability; the `least` best at least, and those equal to the last of them."""

    probability: float
    least: int

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates | None:
        threshold = (found.log_total() + math.log(self.probability)).unsqueeze(-1)
        if not _reaches(found, threshold, self.least):
            return None
        last = found.logits[:, : self.least].amin(-1, keepdim=True)
        return found.kept(found.logits >= torch.minimum(threshold, last))


def _reaches(found: Candidates, threshold: Tensor, least: int) -> bool:
    """Whether the candidates hold every token of at least `threshold (B, 1)`, and the `least` best."""
    if found.closed:
        return True
    last = found.logits[:, :least].amin(-1, keepdim=True)
    lowest = torch.minimum(threshold, last).squeeze(-1)
    return found.logits.shape[-1] >= least and found.surely_above(lowest)


@dataclass(frozen=True)
class TopP:
    """The best tokens until their probabilities reach `mass`; the `least` best at least."""

    mass: float
    least: int

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates | None:
        share = (found.logits - found.log_total()[:, None]).double().exp()
        upto = share.cumsum(-1)
        enough = (upto[:, -1] >= self.mass) & (found.logits.shape[-1] >= self.least)
        if not bool((enough | (found.outside == -torch.inf)).all()):
            return None
        mask = upto - share < self.mass
        mask[:, : self.least] = True
        return found.kept(mask)


@dataclass(frozen=True)
class ByValue:
    """A processor that sees scores and not whose they are, once no other token is left."""

    processor: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates | None:
        if not found.closed:
            return None
        return found.replaced(self.processor(input_ids, found.logits))


class Lowering:
    """A processor that only lowers scores, each by itself: by its own code, on rows in which all others are -inf."""

    def __init__(self, processor: Any, vocab: int):
        self.processor, self.vocab = processor, vocab
        self._rows: Tensor | None = None

    def __call__(self, input_ids: Tensor, found: Candidates) -> Candidates:
        shape = len(found.logits), self.vocab
        if self._rows is None or self._rows.shape != shape:
            self._rows = found.logits.new_full(shape, -torch.inf)
        rows = self._rows.scatter_(-1, found.tokens, found.logits)
        lowered = self.processor(input_ids, rows).gather(-1, found.tokens)
        rows.scatter_(-1, found.tokens, -torch.inf)
        return found.replaced(lowered)
