"""Heads on top of another head: what a wrapping spec and its module share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.registry import variants

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


def _dense() -> Any:
    return variants("head")["dense"]()  # a variant, which this module comes before


@dataclass(frozen=True)
class WrapperSpec(HeadSpec):
    """A spec around `inner`, any head: checked and fitted with it. `Temperature(inner=Quantized(bits=4))`."""

    inner: HeadSpec = field(default_factory=_dense, kw_only=True)

    def check(self, dim: int, vocab: int) -> None:
        self.inner.check(dim, vocab)

    @torch.no_grad()
    def fit(self, head: Any, weight: Tensor, bias: Tensor | None, stats: HeadStats | None) -> None:
        self.inner.fit(head.inner, weight, bias, stats)


class WrapperHead(Head):
    """A head around `inner`; `in_fp32` names its own parameters that half precision would spoil."""

    def __init__(self, dim: int, vocab: int, inner: Head, in_fp32: Iterable[str] = ()):
        super().__init__(dim, vocab)
        self.inner = inner
        self.keep_in_fp32 = (*in_fp32, *(f"inner.{name}" for name in inner.keep_in_fp32))

    @property
    def backend(self) -> str:
        return self.inner.backend

    @property
    def bytes_read(self) -> int:
        return self.nbytes - self.inner.nbytes + self.inner.bytes_read

    @property
    def flops(self) -> int:
        own = sum(p.numel() for p in self.parameters(recurse=False) if p.ndim > 1)
        return self.inner.flops + 2 * own

    def code_table(self) -> tuple[Tensor, int] | None:
        return self.inner.code_table()

    def notes(self) -> list[str]:
        return self.inner.notes()
