"""Adaptive softmax, converted from a trained dense head."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import blocks, linear_log_mass, over_states, scores_of
from hf_softheads.heads.fit.hessian import principal_directions
from hf_softheads.heads.fit.kmeans import require_finite
from hf_softheads.registry import Bounds, Count

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_STATES = 4096  # hidden states that the cluster rows are fitted to


@dataclass(frozen=True)
class Adaptive(HeadSpec, name="adaptive"):
    """`log p(v) = log p_head(v)` for frequent tokens, `log p_head(band) + log p_band(v)` for the rest.

    Tokens sorted by frequency; the first `cutoffs[0]` have full rows, band i between two cutoffs has rank
    `D / div**(i+1)` (Grave et al. 2017, arXiv 1609.04309). Logits are the log-probabilities themselves. Training
    computes a band only for the tokens in it; a step that wants all probabilities is not faster than the bands' size.

    Converted, not trained: full rows are copied, bands are low-rank matrices in the metric of the hidden states, and
    a band's row and bias are the linear function of h nearest to the `log Σ exp` of its logits.

    Attributes:
        cutoffs: rising token ranks below V; the last band ends at V.
        div: how much smaller the rank of the next band is.
    """

    cutoffs: tuple[Count, ...]
    div: Annotated[float, Bounds(at_least=1)] = 4.0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [
            cls((vocab // 16, vocab // 4)),
            cls((vocab // 8, vocab // 2), 2.0),
            cls((vocab // 2,), 2.0),
        ]

    def check(self, dim: int, vocab: int) -> None:
        edges = (0, *self.cutoffs, vocab)
        if not self.cutoffs or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(
                f"adaptive asked for cutoffs {self.cutoffs} of {vocab} tokens; "
                f"they must rise and lie in 1 … {vocab - 1}"
            )
        if dim / self.div ** len(self.cutoffs) < 1:
            raise ValueError(
                f"adaptive asked for div {self.div} with {len(self.cutoffs)} bands of a head of dimension {dim}; "
                "it must leave the last band a rank of at least 1"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> AdaptiveHead:
        return AdaptiveHead(dim, vocab, self.cutoffs, self.div, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: AdaptiveHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        if stats is None:
            raise ValueError(
                f"{self} needs the token frequencies; pass stats=sh.collect(model, batches)"
            )
        order = stats.frequency.argsort(descending=True, stable=True).to(weight.device)
        head.order.copy_(order)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias[order])
        first = self.cutoffs[0]
        head.weight[:first] = weight[order[:first]]
        states = stats.states[:_STATES].to(weight.device)
        total = over_states(
            lambda h: scores_of(h, weight, bias).logsumexp(-1), states, len(weight), "all tokens"
        )
        for band, (start, stop) in enumerate(head.bands):
            mine = order[start:stop]
            seen = dataclasses.replace(stats, curvature=stats.curvature.to(weight.device)[mine])
            project, down = principal_directions(weight[mine], seen, len(head.down[band]))
            for which in blocks(len(mine)):
                head.up[band][which] = weight[mine[which]].float() @ project
            head.down[band].copy_(down)
            mass_of = functools.partial(_mass, head, band)
            mass = over_states(mass_of, states, len(mine), f"band {band + 1}")
            row, shift = linear_log_mass(states, mass, total)
            head.weight[first + band], head.band_bias[band] = row, shift


def _mass(head: AdaptiveHead, band: int, hidden: Tensor) -> Tensor:
    """`log Σ exp` of a band's logits."""
    return head.band(hidden, band).logsumexp(-1)


class AdaptiveHead(Head):
    """`weight (frequent + bands, D)`, `band_bias`, and per band `up (size, r)` and `down (r, D)`; all train."""

    keep_in_fp32 = ("band_bias",)

    def __init__(self, dim: int, vocab: int, cutoffs: tuple[int, ...], div: float, *, bias: bool):
        super().__init__(dim, vocab)
        self.bands = list(pairwise((*cutoffs, vocab)))
        self.weight = nn.Parameter(torch.empty(cutoffs[0] + len(self.bands), dim))
        self.band_bias = nn.Parameter(torch.empty(len(self.bands)))
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None  # by falling frequency
        ranks = [max(1, int(dim / div ** (i + 1))) for i in range(len(self.bands))]
        self.up = nn.ParameterList(
            torch.empty(stop - start, rank)
            for (start, stop), rank in zip(self.bands, ranks, strict=True)
        )
        self.down = nn.ParameterList(torch.empty(rank, dim) for rank in ranks)
        self.order: Tensor
        self.register_buffer("order", torch.arange(vocab).to(index_dtype(vocab)))

    def index_limits(self) -> dict[str, int]:
        return {"order": self.out_features}

    def frequent(self, hidden: Tensor) -> Tensor:
        """Logits of the frequent tokens and of the bands, `(…, frequent + bands)` fp32."""
        scores = F.linear(hidden, self.weight).float()
        count = self.bands[0][0]
        shift = scores.new_zeros(count) if self.bias is None else self.bias[:count].float()
        return scores + torch.cat([shift, self.band_bias.float()])

    def band(self, hidden: Tensor, band: int) -> Tensor:
        """Logits of a band's tokens, `(…, size)` fp32."""
        scores = F.linear(F.linear(hidden, self.down[band]), self.up[band]).float()
        start, stop = self.bands[band]
        return scores if self.bias is None else scores + self.bias[start:stop]

    def scores(self, hidden: Tensor) -> Tensor:
        head = self.frequent(hidden).log_softmax(-1)
        count = self.bands[0][0]
        parts = [head[..., :count]]
        for band in range(len(self.bands)):
            inside = self.band(hidden, band).log_softmax(-1)
            parts.append(inside + head[..., count + band, None])
        return torch.cat(parts, -1).index_select(-1, self._places())

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self._known_transform().steps:
            return super().log_prob(hidden, labels)
        count = self.bands[0][0]

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            place = self._places()[y].long()
            head = self.frequent(h).log_softmax(-1)
            own = torch.bucketize(place, self._edges(), right=True)  # 0: frequent, 1 …: bands
            picked = torch.where(own == 0, place, count + own - 1)
            out = head.gather(-1, picked.unsqueeze(-1)).squeeze(-1)
            for band, (start, _) in enumerate(self.bands):
                mine = (own == band + 1).nonzero().flatten()
                inside = self.band(h[mine], band).log_softmax(-1)
                value = inside.gather(-1, (place[mine] - start).unsqueeze(-1)).squeeze(-1)
                out = out.index_add(0, mine, value)
            return out

        return self._in_chunks(chunk, hidden, labels)

    def _places(self) -> Tensor:
        order = self.order
        return self._derived("places", lambda: order.long().argsort().int(), order)

    def _edges(self) -> Tensor:
        return torch.tensor([start for start, _ in self.bands], device=self.order.device)

    @property
    def flops(self) -> int:
        return 2 * sum(p.numel() for p in self.parameters() if p.ndim == 2)
