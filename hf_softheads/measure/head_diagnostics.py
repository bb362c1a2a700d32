"""The head's part of `diagnose`: the softmax bottleneck, code usage, and the loss by token frequency."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_softheads import bridge
from hf_softheads.heads.base import Head
from hf_softheads.plan import dense_head
from hf_softheads.report.tables import Table

_STATES = 2048  # hidden states in the spectra
_CHUNK_ELEMENTS = 2**24  # logits held at once
_NUMERICAL = 1e-5  # of the largest singular value: what is below is rounding of fp32 logits
_ROUNDING = 1 / 8  # the same for a model in half precision, times its dtype's epsilon
_WIDTH = 8  # a frequency band ends at this multiple of the rank at which the one before ended
_FIRST = 16


@dataclass(frozen=True)
class FrequencyBand:
    """Tokens of neighbouring frequency.

    Attributes:
        first, last: their ranks by frequency, from 1.
        tokens: how many tokens of the batch they are.
        loss: mean `-log p` of those, nats; None without any.
        dense_loss: the same under the head that `patch` took out; None where it is not in memory.
    """

    first: int
    last: int
    tokens: int
    loss: float | None
    dense_loss: float | None


@dataclass(frozen=True)
class HeadDiagnostics:
    """What a head does on a batch.

    The logits of N contexts are an `N × V` matrix whose rows matter up to a constant, so each is taken less its mean.
    A softmax over a linear head cannot give this matrix a rank above D (Yang et al., arXiv 1711.03953).

    Attributes:
        name: the head's class.
        states: N, the hidden states looked at.
        dim: D.
        rank: singular values of that matrix above 1e-5 (1e-3 in bf16) of the largest.
        effective_rank: `exp` of the entropy of its singular values, each over their sum (Roy & Vetterli 2007).
        spectrum: its singular values, the largest first, over the largest.
        state_effective_rank, state_spectrum: the same of the hidden states, less their mean.
        codes: how many codes a token chooses from; None for a head without codes.
        unused_codes: share of the codes that no token of the vocabulary has, mean over groups.
        code_usage: `exp` of the entropy of the codes of the batch's next tokens, over `codes`, mean over groups.
        bands: loss by frequency of the next token; ranks count by the statistics, or by the batch itself.
    """

    name: str
    states: int
    dim: int
    rank: int
    effective_rank: float
    spectrum: list[float]
    state_effective_rank: float
    state_spectrum: list[float]
    codes: int | None
    unused_codes: float | None
    code_usage: float | None
    bands: list[FrequencyBand]

    def __str__(self) -> str:
        table = Table(["frequency rank", "tokens", "loss (nats)", "dense head", "difference"])
        for band in self.bands:
            if band.loss is None:
                continue
            dense, gap = "–", "–"
            if band.dense_loss is not None:
                dense, gap = f"{band.dense_loss:.3f}", f"{band.loss - band.dense_loss:+.3f}"
            span = f"{band.first:,} – {band.last:,}"
            table.add(span, f"{band.tokens:,}", f"{band.loss:.3f}", dense, gap)
        lines = [
            str(table),
            f"  {self.name}: logits of {self.states:,} states have rank {self.rank}, effectively "
            f"{self.effective_rank:.1f} (hidden states {self.state_effective_rank:.1f} of {self.dim})",
        ]
        if self.codes is not None:
            lines.append(
                f"  {self.codes:,} codes, {self.unused_codes:.1%} without a token, "
                f"{self.code_usage:.1%} of them used by the text (exp of the entropy)"
            )
        return "\n".join(lines)


@torch.no_grad()
def diagnose_head(
    model: nn.Module, hidden: Tensor, labels: Tensor, counts: Tensor | None = None
) -> HeadDiagnostics:
    """Look at a model's head on hidden states `(N, D)` and the tokens `(N,)` that follow them.

    Args:
        counts: how often each token occurs, `(V,)`; by default counted in `labels`.
    """
    reader = bridge.SplitModel(model)
    size = max(1, _CHUNK_ELEMENTS // reader.vocab)
    try:
        dense: nn.Module | None = dense_head(model)
    except ValueError:
        dense = None
    losses = [_losses(reader.logits(h), y) for h, y in _pairs(hidden, labels, size)]
    before: list[Tensor] = []
    if dense is not None:
        for h, y in _pairs(hidden, labels, size):
            before.append(_losses(reader.transform(dense(h).float()), y))
    if counts is None:
        counts = torch.bincount(labels, minlength=reader.vocab)
    few = hidden[:_STATES]
    spectrum = _gram(few, reader, size).clamp_min(0).sqrt()
    states = torch.linalg.svdvals(few.double() - few.double().mean(0))
    codes = _codes(reader.head, labels)
    threshold = max(_NUMERICAL, _ROUNDING * torch.finfo(hidden.dtype).eps)
    return HeadDiagnostics(
        name=type(reader.head).__name__,
        states=len(few),
        dim=hidden.shape[-1],
        rank=int((spectrum > threshold * spectrum[0]).sum()),
        effective_rank=effective_rank(spectrum),
        spectrum=(spectrum / spectrum[0].clamp_min(1e-300)).tolist(),
        state_effective_rank=effective_rank(states),
        state_spectrum=(states / states[0].clamp_min(1e-300)).tolist(),
        codes=codes and codes[0],
        unused_codes=codes and codes[1],
        code_usage=codes and codes[2],
        bands=_bands(torch.cat(losses), torch.cat(before) if before else None, labels, counts),
    )


def effective_rank(values: Tensor) -> float:
    """`exp H(σ / Σσ)` of singular values."""
    return float(torch.special.entr(values / values.sum().clamp_min(1e-300)).sum().exp())


def _pairs(hidden: Tensor, labels: Tensor, size: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(hidden.split(size), labels.split(size), strict=True)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def _gram(hidden: Tensor, reader: bridge.SplitModel, size: int) -> Tensor:
    """Squared singular values of the centred logits, falling; pairs of chunks, so that few logits are held."""

    def centred(h: Tensor) -> Tensor:
        logits = reader.logits(h).double()
        return logits - logits.mean(-1, keepdim=True)

    parts = hidden.split(max(1, size // 4))  # two chunks in fp64
    rows = []
    for i, part in enumerate(parts):
        own = centred(part)
        blocks = [own @ (own if j == i else centred(parts[j])).T for j in range(i + 1)]
        blocks += [own.new_zeros(len(own), len(other)) for other in parts[i + 1 :]]
        rows.append(torch.cat(blocks, 1))
    values: Tensor = torch.linalg.eigvalsh(torch.cat(rows)).flip(
        0
    )  # it reads the lower triangle only
    return values


def _codes(head: nn.Module, labels: Tensor) -> tuple[int, float, float] | None:
    found = head.code_table() if isinstance(head, Head) else None
    if found is None:
        return None
    table, codes = found
    unused, used = [], []
    for column in table.T:
        unused.append(float((torch.bincount(column, minlength=codes) == 0).double().mean()))
        share = torch.bincount(column[labels], minlength=codes).double()
        used.append(effective_rank(share) / codes)
    return codes, sum(unused) / len(unused), sum(used) / len(used)


def _bands(
    loss: Tensor, dense: Tensor | None, labels: Tensor, counts: Tensor
) -> list[FrequencyBand]:
    order = counts.to(labels.device).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    bands = []
    first, last = 0, min(_FIRST, len(order))
    while first < len(order):
        mine = (rank[labels] >= first) & (rank[labels] < last)
        count = int(mine.sum())
        bands.append(
            FrequencyBand(
                first + 1,
                last,
                count,
                float(loss[mine].double().mean()) if count else None,
                float(dense[mine].double().mean()) if count and dense is not None else None,
            )
        )
        first, last = last, min(last * _WIDTH, len(order))
    return bands
