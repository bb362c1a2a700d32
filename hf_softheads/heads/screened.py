"""A cheap preview of all logits, exact ones for the tokens that matter, a calibrated sum over the rest."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec, LogitTransform
from hf_softheads.heads.dense import Dense
from hf_softheads.heads.fit.blockwise import over_states, scores_of
from hf_softheads.heads.forms.largest import largest, logsumexp, packed, unpacked
from hf_softheads.heads.forms.sampling import check_temperature
from hf_softheads.heads.forms.token_numbers import of_logits
from hf_softheads.kernels import why_not
from hf_softheads.registry import Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

STATES = 2048  # hidden states that calibrate the tail
_NEWTON = 12
_EXACT = 1e-5  # nats by which the calibrated level may differ
_STEP = 1e-2  # of the difference quotient


@dataclass(frozen=True)
class Screened(HeadSpec, name="screened"):
    """`screen` scores all tokens cheaply, `inner` scores its `candidates` best exactly; the rest keeps its preview.

    `z_v = inner_v(h)` for a candidate, `screen_v(h) + weight` for any other token: every token has a probability, and
    `weight`, one number, makes the mean of `log Σ exp z` that of the dense head on sampled hidden states. This is
    SVD-softmax (Shim et al. 2017) with any compact head as its preview and a calibrated normaliser. Products with
    candidate rows are accumulated in fp32, so the greedy token is nearer to the fp32 model's than that of a bf16
    matrix product. Any batch size; sampling and log-probabilities are those of the mixed logits.

    Attributes:
        screen: any head but another screened one: `transform_coded` reads least, `residual_vq` is fastest.
        candidates: tokens scored exactly for each hidden state.
        inner: stores the exact rows: any head that scores single tokens from rows of their own.
    """

    screen: HeadSpec
    candidates: Count
    inner: HeadSpec = field(default_factory=Dense)

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        from hf_softheads.heads.low_rank import LowRank

        return [cls(LowRank(max(1, dim // part)), max(1, vocab // 64)) for part in (8, 4, 2)]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        from hf_softheads.heads.low_rank import LowRank

        return cls(LowRank(1), vocab)

    def check(self, dim: int, vocab: int) -> None:
        if self.candidates > vocab:
            raise ValueError(
                f"{self.name} asked for {self.candidates} candidates; 1 to {vocab} are possible"
            )
        if isinstance(self.screen, Screened):
            raise ValueError(
                f"the screen of a {self.name} head cannot be screened itself, it is {self.screen.name}"
            )
        self.screen.check(dim, vocab)
        self.inner.check(dim, vocab)
        with torch.device("meta"):
            inner = self.inner.module(dim, vocab)
        if type(inner).score is Head.score:
            raise ValueError(
                f"{self.name} reads single rows of its inner head, and a {self.inner.name} head scores all tokens at "
                "once; take one that stores a row for each token, such as dense, quantized or product_vq"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> ScreenedHead:
        screen = self.screen.module(dim, vocab, bias=bias)
        inner = self.inner.module(dim, vocab, bias=bias)
        return ScreenedHead(dim, vocab, self.candidates, screen, inner)

    @torch.no_grad()
    def fit(
        self, head: ScreenedHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        self.screen.fit(head.screen, weight, bias, stats)
        self.inner.fit(head.inner, weight, bias, stats)
        head.weight.zero_()
        if stats is not None:
            head.calibrate(stats.states[:STATES].to(weight.device), weight, bias)


class ScreenedHead(Head):
    """`weight (1,)` is added to the previews of the tail; it trains, and what `screen` and `inner` train."""

    def __init__(self, dim: int, vocab: int, candidates: int, screen: Head, inner: Head):
        super().__init__(dim, vocab)
        self.candidates = candidates
        self.weight = nn.Parameter(torch.empty(1))
        self.screen, self.inner = screen, inner
        self.keep_in_fp32 = (
            "weight",
            *(f"screen.{name}" for name in screen.keep_in_fp32),
            *(f"inner.{name}" for name in inner.keep_in_fp32),
        )

    def scores(self, hidden: Tensor) -> Tensor:
        return self._in_chunks(self._mixed, hidden, width=self._width)

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        transform = self._known_transform()

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            z = transform(self._mixed(h))
            return z.gather(-1, y.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)

        return self._in_chunks(chunk, hidden, labels, width=self._width)

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        transform = self._known_transform()

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            return of_logits(transform(self._mixed(h)) / temperature, y, moments)

        return self._in_chunks(chunk, hidden, labels, width=self._width)

    def _mixed(self, hidden: Tensor) -> Tensor:
        previews = self.screen.scores(hidden).float()
        tokens = largest(previews.detach(), self.candidates, self.kernels)[1]
        exact = self.inner.score(hidden, tokens)
        if torch.is_grad_enabled():
            return (previews + self.weight).scatter(-1, tokens, exact)
        return previews.add_(self.weight).scatter_(-1, tokens, exact)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, tokens = self._found(hidden, k, None)
        return values, tokens

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_temperature(temperature)
        values, tokens, total = self._found(hidden, k, temperature)
        return values, tokens, total

    def _found(self, hidden: Tensor, k: int, temperature: float | None) -> tuple[Tensor, ...]:
        def chunk(h: Tensor) -> Tensor:
            return self._best(h, k, temperature)

        return unpacked(self._in_chunks(chunk, hidden, width=self._width), k)

    def _best(self, hidden: Tensor, k: int, temperature: float | None) -> Tensor:
        """The largest logits and their tokens and, at a temperature, `log Σ exp(z / T)` of all, `packed`."""
        transform = self._known_transform()
        previews = self.screen.scores(hidden).float()
        count = min(self.candidates + k, self.out_features)
        values, tokens = largest(previews, count, self.kernels)
        chosen = tokens[..., : self.candidates]
        exact = transform(self.inner.score(hidden, chosen))
        rest = transform(values[..., self.candidates :] + self.weight)
        most, place = torch.cat([exact, rest], -1).topk(k, -1)
        best = most, tokens.gather(-1, place)
        if temperature is None:
            return packed(*best)
        tail = transform(previews.add_(self.weight)).scatter_(-1, chosen, -torch.inf)
        tail = tail if temperature == 1 else tail.div_(temperature)
        inner = (exact / temperature).logsumexp(-1)
        return packed(*best, torch.logaddexp(inner, logsumexp(tail, self.kernels)))

    def code_table(self) -> tuple[Tensor, int] | None:
        return self.inner.code_table() or self.screen.code_table()

    def why_no_kernel(self) -> str | None:
        return self.screen.why_no_kernel() or why_not("screened")

    @property
    def backend(self) -> str:
        return f"screen: {self.screen.backend}; candidates: {self.inner.backend}"

    @property
    def _width(self) -> int:
        """Numbers held for a hidden state: in training the rows of its candidates too."""
        rows = 2 * self.candidates * self.in_features if torch.is_grad_enabled() else 0
        return self.out_features + rows

    @torch.no_grad()
    def calibrate(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Set `weight` so that the mean of `log Σ exp` on these hidden states is that of the dense head."""
        transform = self.transform or (lambda z: z)

        def true(h: Tensor) -> Tensor:
            return transform(scores_of(h, weight, bias)).logsumexp(-1)

        def masses(h: Tensor, shift: float = 0.0) -> Tensor:
            previews = self.screen.scores(h).float()
            tokens = previews.topk(self.candidates, -1).indices
            exact = transform(self.inner.score(h, tokens)).logsumexp(-1)
            tail = transform(previews + shift).scatter(-1, tokens, -torch.inf)
            return torch.stack([exact, tail.logsumexp(-1)], 1)

        wanted = over_states(true, states, len(weight), "all tokens").double().mean()
        found = over_states(masses, states, self._width, "tail of the screen")
        known, tail = found.double().unbind(1)
        if not bool(tail.isfinite().any()):
            return  # every token is a candidate
        scale = LogitTransform().scale if self.transform is None else self.transform.scale

        def level(shift: float) -> float:
            moved = tail + scale * shift if scale is not None else measured(shift)
            return float(torch.logaddexp(known, moved).mean())

        def measured(shift: float) -> Tensor:  # a soft cap moves every score by something else
            part = functools.partial(masses, shift=shift)
            return over_states(part, states, self._width, "tail of the screen")[:, 1].double()

        shift = 0.0
        for _ in range(_NEWTON):  # the level is smooth and monotonic in the shift
            here = level(shift)
            if abs(missing := float(wanted) - here) < _EXACT:
                break
            slope = (level(shift + _STEP) - here) / _STEP
            step = missing / math.copysign(max(abs(slope), 1e-3), slope)
            shift += min(max(step, -2.0), 2.0)
        self.weight.fill_(shift)

    @property
    def bytes_read(self) -> int:
        return self.screen.bytes_read + self.inner.nbytes * self.candidates // self.out_features

    @property
    def flops(self) -> int:
        return self.screen.flops + 2 * self.candidates * self.in_features

    def notes(self) -> list[str]:
        share = self.bytes_read / (2 * self.in_features * self.out_features)
        return [f"reads {share:.1%} of a bf16 matrix per token", *self.screen.notes()]
