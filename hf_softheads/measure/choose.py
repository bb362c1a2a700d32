"""Choose the head that loses least within a byte budget, by trying the candidates on held-out hidden states."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads import bridge
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.stats import HeadStats, check_stats
from hf_softheads.heads.transform_coded import TransformCoded
from hf_softheads.measure.divergence import from_dense
from hf_softheads.measure.sizes import stored_bits
from hf_softheads.registry import variants

_HELD_OUT = 4096  # states, at most a quarter of those in the statistics
_NEEDED = 8192  # tokens in the statistics below which the choice is doubtful


@dataclass(frozen=True)
class Trial:
    """One candidate: what it stores and what it loses.

    Attributes:
        bits: stored bits per weight of the dense matrix, parameters in bf16, everything included.
        kl: `E KL(dense ‖ candidate)` in nats; perplexity grows by about `exp(kl)`.
        agreement: how often the most likely token is the dense head's.
    """

    spec: HeadSpec
    bits: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Choice:
    """What `choose` found: the best spec, and all trials, the least loss first."""

    spec: HeadSpec
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        lines = [f"{'bits':>6} {'KL':>8} {'top-1':>6}  head"]
        lines += [f"{t.bits:6.2f} {t.kl:8.4f} {t.agreement:6.1%}  {t.spec}" for t in self.trials]
        return "\n".join(lines)


@torch.no_grad()
def choose(
    model: nn.Module,
    stats: HeadStats,
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    candidates: Iterable[HeadSpec] | None = None,
) -> Choice:
    """The head of least KL divergence from the dense one that is stored in the budget; the model is not changed.

    Every candidate is fitted with the statistics less a part of their hidden states, and measured on that part.

    Args:
        bits: budget per weight of the dense matrix, everything included; or
        nbytes: budget in bytes.
        candidates: default the two largest of every variant's ladder that fit, and `transform_coded` at just the
            budget.

    Raises:
        TypeError: `model` is not a transformers model, or `stats` not what `collect` returns.
        ValueError: not exactly one budget, statistics of another model or of fewer than 4 hidden states, or no
            candidate within the budget (the message names the smallest).
    """
    base, weight, bias = _dense(model)
    vocab, dim = weight.shape
    check_stats(stats)
    stats.check(dim, vocab, least=_NEEDED)
    sized = within_budget(model, bits=bits, nbytes=nbytes, candidates=candidates)
    count = min(_HELD_OUT, len(stats.states) // 4)
    if count < 1:
        raise ValueError(
            f"the statistics hold {len(stats.states)} hidden states; at least 4 needed"
        )
    held_out = stats.states[:count].to(weight.device)
    fitting = replace(stats, states=stats.states[count:], labels=stats.labels[count:])
    transform = bridge.logit_transform(base)
    trials = []
    for stored, spec in tqdm(sized, desc="choosing a head", disable=None, leave=False):
        with torch.device(weight.device):
            head = spec.module(dim, vocab, bias=bias is not None)
        head.transform = transform
        spec.fit(head, weight, bias, fitting)
        kl, agreement = from_dense(head, weight, bias, held_out)
        trials.append(Trial(spec, stored, kl, agreement))
    trials.sort(key=lambda t: t.kl)
    return Choice(trials[0].spec, tuple(trials))


def within_budget(
    model: nn.Module,
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    candidates: Iterable[HeadSpec] | None = None,
) -> list[tuple[float, HeadSpec]]:
    """The heads that `choose` would try, with the bits per weight that each stores.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: not exactly one budget, or no candidate within it (the message names the smallest).
    """
    _, weight, bias = _dense(model)
    vocab, dim = weight.shape
    if (bits is None) == (nbytes is None):
        raise ValueError("give one budget: bits=… per weight, or nbytes=…")
    given = bits if bits is not None else nbytes
    if not isinstance(given, Real) or not 0 < given < math.inf:
        raise ValueError(f"a budget is a finite number above 0, got {given!r}")
    budget = float(bits) if bits is not None else 8 * float(nbytes or 0) / weight.numel()
    ladders = _ladders(dim, vocab, budget) if candidates is None else [list(candidates)]
    sized: list[tuple[float, HeadSpec]] = []
    smallest = math.inf
    for ladder in ladders:
        sizes = [stored_bits(spec, dim, vocab, bias=bias is not None) for spec in ladder]
        smallest = min([smallest, *sizes])
        fitting_in = [pair for pair in zip(sizes, ladder, strict=True) if pair[0] <= budget]
        sized += fitting_in if candidates is not None else fitting_in[-2:]
    if not sized:
        asked = f"{budget:.4g} bits per weight" + (f" ({nbytes:g} bytes)" if bits is None else "")
        raise ValueError(
            f"no head fits into {asked}; the smallest candidate takes {smallest:.4g} "
            f"({smallest * weight.numel() / 8:,.0f} bytes)"
        )
    return sized


def _dense(model: nn.Module) -> tuple[Any, Tensor, Tensor | None]:
    """The transformers model, the matrix of its head and its bias."""
    base = bridge.transformers_model(model)
    path, dense = bridge.find_head(base)
    bridge.check_linear(path, dense)
    return base, dense.weight.detach(), getattr(dense, "bias", None)


def _ladders(dim: int, vocab: int, budget: float) -> list[list[HeadSpec]]:
    ladders = []
    for cls in variants("head").values():
        assert issubclass(cls, HeadSpec)
        ladders.append(cls.ladder(dim, vocab))
    for rank in (dim, dim * 3 // 4, dim // 2):
        exact = TransformCoded(bits=budget, rank=rank)
        try:
            exact.check(dim, vocab)
        except ValueError:
            continue  # the budget does not even hold its tables, or is more than it can use
        ladders.append([exact])
    return ladders
