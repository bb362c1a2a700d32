"""The row of the output matrix that a head has, or can rebuild, for each token."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

RowKind = Literal["trained", "rebuilt", "shared", "none"]


@runtime_checkable
class TokenRows(Protocol):
    """A head with a row for each token: raw scores are `row_v · h`, but for a bias and a factor.

    Attributes:
        row_kind: `trained` rows are those of the dense matrix, `rebuilt` ones approximate them, `shared` ones belong to
            several tokens; `none`: a head inside this one has no rows.
    """

    @property
    def row_kind(self) -> RowKind: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of `tokens (N,)` in the coordinates of hidden states, `(N, D)` fp32; differentiable."""


def token_rows(head: nn.Module) -> TokenRows | None:
    """The head that holds the rows: itself, or the one inside a head that only scores with them; None without rows."""
    if isinstance(head, TokenRows):
        return None if head.row_kind == "none" else head
    inner = getattr(head, "inner", None)
    return token_rows(inner) if isinstance(inner, nn.Module) else None
