"""The dense head itself, as a variant: the control that proves that the plumbing changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads import base
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.forms.matrix_numbers import Walk, of_matrix
from hf_softheads.heads.forms.streamed_rows import products
from hf_softheads.heads.forms.token_rows import RowKind
from hf_softheads.kernels import why_not
from hf_softheads.kernels.dense import dense_score

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class Dense(HeadSpec, name="dense"):
    """`F.linear(hidden, weight, bias)`: the trained matrix, copied. Lossless by definition."""

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls()]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls()

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> DenseHead:
        return DenseHead(dim, vocab, bias=bias)

    @torch.no_grad()
    def fit(
        self, head: DenseHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        head.weight.copy_(weight)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)


class DenseHead(Head):
    row_kind: RowKind = "trained"

    def __init__(self, dim: int, vocab: int, *, bias: bool):
        super().__init__(dim, vocab)
        self.weight = nn.Parameter(torch.empty(vocab, dim))
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).float()

    def score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        if not self._gathers(hidden):
            flat: Tensor = dense_score(self.weight, hidden.flatten(0, -2), tokens.flatten(0, -2))
            found: Tensor = flat.view(tokens.shape)
            return found if self.bias is None else found + self.bias[tokens]
        scores = products(lambda where: self.weight.index_select(0, where), hidden, tokens)
        return scores if self.bias is None else scores + self.bias[tokens]

    def _gathers(self, hidden: Tensor) -> bool:
        """Does torch copy the candidates' rows, instead of the kernel reading them where they lie?"""
        return (
            self.kernels == "off"
            or (self.training and torch.is_grad_enabled())
            or hidden.ndim < 2
            or self.weight.dtype != torch.bfloat16
            or self.weight.device.type != "cpu"
            or not self.weight.is_contiguous()
            or why_not("dense") is not None
        )

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[tokens]
        return F.linear(hidden, self.weight[tokens], bias).float()

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        walk = Walk(self._known_transform(), temperature, moments, base._CHUNK_ELEMENTS)
        flat = hidden.reshape(-1, hidden.shape[-1])
        found = of_matrix(flat, self.weight, self.bias, labels.reshape(-1), walk)
        return found.view(*labels.shape, found.shape[-1])

    def resize(self, vocab: int) -> DenseHead:
        """Rows are kept; new rows are the mean row, so that a new token starts as an average one."""
        new = DenseHead(self.in_features, vocab, bias=self.bias is not None).to(self.weight)
        new.transform = self.transform
        kept = min(vocab, self.out_features)
        with torch.no_grad():
            new.weight.copy_(self.weight.mean(0).expand_as(new.weight))
            new.weight[:kept] = self.weight[:kept]
            if self.bias is not None and new.bias is not None:
                new.bias.fill_(float(self.bias.mean()))
                new.bias[:kept] = self.bias[:kept]
        return new
