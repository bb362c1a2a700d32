"""What every embedding variant is: a spec that builds a module in place of the model's own and fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_softheads.registry import Spec

if TYPE_CHECKING:
    from hf_softheads.heads.base import Head
    from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class EmbeddingSpec(Spec, kind="embedding"):
    """A variant of the input embedding of a model that ties it to its head."""

    def complete(self, head: Head) -> EmbeddingSpec:
        """The spec for this head, which may be empty (on the meta device), with what was left open decided.

        Raises:
            ValueError: the head cannot give what the embedding needs.
        """
        return self

    def module(self, old: nn.Embedding) -> Any:
        """An uninitialised module in place of the embedding `old`; works on the meta device."""
        raise NotImplementedError

    def fit(
        self, embedding: Any, weight: Tensor, stats: HeadStats | None, special: tuple[int, ...]
    ) -> None:
        """Set the module's own tensors from the trained `weight (V, D)`; it is bound to a head that is fitted.

        `special`: tokens that mark something, such as the start of a turn; no text says how much they matter.
        """
        raise NotImplementedError
