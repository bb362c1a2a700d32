"""What `repair_head` asks of a head whose integer codes can be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Additive(NamedTuple):
    """How a head's rows are sums of codebook entries, for discrete steps of the repair."""

    codes: Tensor  # (V, S) int64
    books: Tensor  # (S, C, w)
    parts: list[slice]
    basis: Tensor | None  # (K, D): the dense row is `row @ basis`
    store: Callable[[Tensor], None]  # puts codes (V, S) into the head


@runtime_checkable
class TrainableCodes(Protocol):
    """A head that suggests rates, and whose codes may be real numbers while it is trained.

    Attributes:
        code_lr: of AdamW for what `relax_codes` gives, in codes a step; 0 for codes that stay.
    """

    @property
    def code_lr(self) -> float: ...

    def repair_lr(self, parameter: Tensor) -> float:
        """The rate of AdamW that suits one of the parameters."""

    def relax_codes(self) -> list[Tensor]:
        """Hold the integer codes as real numbers, to be trained, until `round_codes`; [] where they stay.

        The scores are always those of the rounded numbers: training sees what will be stored.
        """

    def round_codes(self) -> None:
        """Round and pack the real numbers that `relax_codes` gave; the scores stay as they are."""

    def additive(self) -> Additive | None:
        """How the rows are sums of codebook entries; the repair then also changes codes by discrete steps."""
