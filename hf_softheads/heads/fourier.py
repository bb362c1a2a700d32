"""A smooth density over ordinal tokens: numbers, time series, actions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import over_states, progress, scores_of
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.registry import Count, CountOrZero, NotNegative

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_STEPS = 300
_BATCH = 512
_RATE = 0.03
_FLOOR = 1e-5  # added to every probability: a density of few frequencies has zeros


@dataclass(frozen=True)
class Fourier(HeadSpec, name="fourier"):
    """`p(v | h) ∝ |Σ_k a_k exp(iπ k x_v)|² + 1e-5`, `a = weight h + shift` complex, `x_v` the token's place in [-1, 1].

    Source: Gillman et al. 2024, arXiv 2410.22269, whose `½ + Re Σ c_k exp(iπ k x)` with the autocorrelations c of a
    is the same function. For tokens that are bins of a number, in the order of their ids: neighbours get similar
    probabilities, with `2 (frequencies + 1) D` parameters whatever their count. `start` and `stop` mark the ordinal
    tokens of a larger vocabulary; the others keep their rows, and one more row scores the ordinal tokens together.

    There is no closed form from a dense head: with `HeadStats` it is fitted to the dense probabilities of the sampled
    states (300 Adam steps); without, it starts flat and must be trained.

    Attributes:
        frequencies: N; more are less smooth.
        start, stop: ids of the first ordinal token and after the last; by default all tokens are.
        smoothness: weight of the penalty `(2π²/|x|) Σ k² |c_k|²` of the fit, c scaled to `c_0 = 1`.
        seed: of the start and the order of the states.
    """

    frequencies: Count = 12
    start: CountOrZero = 0
    stop: Count | None = None
    smoothness: NotNegative = 0.0
    seed: CountOrZero = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(max(1, vocab // 32))]

    def check(self, dim: int, vocab: int) -> None:
        stop = vocab if self.stop is None else self.stop
        if not self.start < stop - 1 < vocab:
            raise ValueError(
                f"fourier asked for the ordinal tokens {self.start} … {stop - 1} of {vocab}; at least 2 tokens of "
                f"0 … {vocab - 1} are possible"
            )
        if self.frequencies > stop - self.start:
            raise ValueError(
                f"fourier asked for {self.frequencies} frequencies for {stop - self.start} ordinal tokens; "
                f"1 to {stop - self.start} are possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> FourierHead:
        stop = vocab if self.stop is None else self.stop
        return FourierHead(dim, vocab, self.frequencies, self.start, stop, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: FourierHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(head.weight.shape, generator=generator) / 100
        head.weight.copy_(noise.to(head.weight) / head.in_features**0.5)
        head.shift.zero_()
        head.shift[0] = 1.0
        head.states.zero_()
        if head.rows is not None and head.level is not None:
            head.rows[: head.start] = weight[: head.start]
            head.rows[head.start : -1] = weight[head.stop :]
            head.rows[-1] = weight[head.start : head.stop].float().mean(0)
            head.level.fill_(math.log(head.stop - head.start))
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)
        if stats is not None:
            self._distil(head, weight, stats.states.to(weight.device), generator)
            head.states.fill_(len(stats.states))

    def _distil(
        self, head: FourierHead, weight: Tensor, states: Tensor, generator: torch.Generator
    ) -> None:
        """KL from the dense probabilities; the dense bias is added to both, so it is left out here.

        Of the other tokens, whose rows stay, only their `log Σ exp` counts.
        """
        gain = head.logit_scale
        trained = [head.weight.data, head.shift.data]
        if head.rows is not None and head.level is not None:
            trained += [head.rows.data[-1:], head.level.data]
            others = _others(head, weight, states)
        masters = [t.float().clone().requires_grad_() for t in trained]
        optimizer = torch.optim.Adam(masters, lr=_RATE)
        for step in progress(range(_STEPS), "density"):
            chosen = torch.randint(len(states), (_BATCH,), generator=generator).to(states.device)
            h = states[chosen]
            wanted = gain * scores_of(h, weight[head.start : head.stop])
            if head.rows is not None:
                wanted = torch.cat([wanted, others[chosen, None]], 1)
            wanted = wanted.softmax(-1)
            for group in optimizer.param_groups:
                group["lr"] = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
            with torch.enable_grad():
                coefficients = F.linear(h, masters[0], masters[1])
                scores = head.density_of(coefficients).log()
                if head.rows is not None:
                    together = gain * (F.linear(h, masters[2]) + masters[3])
                    scores = torch.cat([scores + together, others[chosen, None]], 1)
                loss = -(wanted * scores.log_softmax(-1)).sum(-1).mean()
                if self.smoothness:
                    loss = loss + self.smoothness * _roughness(coefficients)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        for parameter, master in zip(trained, masters, strict=True):
            parameter.copy_(master)


def _others(head: FourierHead, weight: Tensor, states: Tensor) -> Tensor:
    """`log Σ exp` of the dense logits of the tokens that are not ordinal, `(S,)`."""

    def rest(h: Tensor) -> Tensor:
        z = scores_of(h, weight).mul_(head.logit_scale)
        z[:, head.start : head.stop] = -torch.inf
        return z.logsumexp(-1)

    return over_states(rest, states, len(weight), "other tokens")


def _roughness(coefficients: Tensor) -> Tensor:
    """`2π² Σ_k k² |c_k|²` per state, mean; `c_k = Σ_l a_l ā_{l+k} / Σ |a_l|²` by a zero-padded transform."""
    real, imaginary = coefficients.float().chunk(2, -1)
    a = torch.complex(real, imaginary)
    size = 2 * a.shape[-1]
    c = torch.fft.ifft(torch.fft.fft(a, size).abs().square())[..., : a.shape[-1]]
    c = c / c[..., :1].real.clamp_min(1e-12)
    k = torch.arange(a.shape[-1], device=a.device)
    rough: Tensor = (k.square() * c.abs().square()).sum(-1).mean()
    return 2 * math.pi**2 * rough


class FourierHead(Head):
    """`weight (2 (N + 1), D)` and `shift`: real parts, then imaginary; `rows`, `level` if there are other tokens."""

    keep_in_fp32 = ("shift", "level")

    def __init__(
        self, dim: int, vocab: int, frequencies: int, start: int, stop: int, *, bias: bool
    ):
        super().__init__(dim, vocab)
        self.start, self.stop = start, stop
        self.weight = nn.Parameter(torch.empty(2 * (frequencies + 1), dim))
        self.shift = nn.Parameter(torch.empty(2 * (frequencies + 1)))
        rest = vocab - (stop - start)
        self.rows = nn.Parameter(torch.empty(rest + 1, dim)) if rest else None
        self.level = nn.Parameter(torch.empty(1)) if rest else None
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None
        self.states: Tensor
        self.register_buffer("states", torch.zeros(1, dtype=torch.int32))  # fitted to so many

    def scores(self, hidden: Tensor) -> Tensor:
        ordinal = self.density(hidden).log() / self.logit_scale
        if self.rows is not None and self.level is not None:
            rest = F.linear(hidden, self.rows).float()
            ordinal = ordinal + (rest[..., -1:] + self.level)
            cut = self.start
            ordinal = torch.cat([rest[..., :cut], ordinal, rest[..., cut:-1]], -1)
        return ordinal if self.bias is None else ordinal + self.bias

    def density(self, hidden: Tensor) -> Tensor:
        """Probabilities of the ordinal tokens among themselves plus 1e-5, `(…, n)` fp32."""
        return self.density_of(F.linear(hidden, self.weight).float() + self.shift)

    def density_of(self, coefficients: Tensor) -> Tensor:
        """The same from the real and imaginary parts, `(…, 2 (N + 1))`."""
        real, imaginary = coefficients.chunk(2, -1)
        cosines, sines = self._waves()
        along = real @ cosines - imaginary @ sines
        across = real @ sines + imaginary @ cosines
        power = along.square() + across.square()
        return power / power.sum(-1, keepdim=True).clamp_min(1e-30) + _FLOOR

    def others(self) -> Tensor:
        """Ids of the tokens that are not ordinal."""
        device = self.weight.device
        return torch.cat(
            [
                torch.arange(self.start, device=device),
                torch.arange(self.stop, self.out_features, device=device),
            ]
        )

    def _waves(self) -> tuple[Tensor, Tensor]:
        count = self.stop - self.start
        places = (torch.arange(count, device=self.weight.device) + 0.5) * (2 / count) - 1
        k = torch.arange(len(self.weight) // 2, device=self.weight.device)
        angle = math.pi * k[:, None] * places
        return angle.cos(), angle.sin()

    @property
    def flops(self) -> int:
        own = 2 * self.weight.numel() + (0 if self.rows is None else 2 * self.rows.numel())
        return own + 4 * len(self.weight) * (self.stop - self.start)

    def notes(self) -> list[str]:
        tokens = (
            f"tokens {self.start} … {self.stop - 1} are taken for bins of a number, by their ids"
        )
        if int(self.states):
            return [f"{tokens}; fitted to {int(self.states)} hidden states"]
        return [f"{tokens}; flat, there were no statistics to fit it to (patch with stats=…)"]
