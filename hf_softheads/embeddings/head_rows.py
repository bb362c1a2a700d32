"""The input embedding reads its rows out of the head's codes: one table for both ends of the model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_softheads.embeddings.base import EmbeddingSpec
from hf_softheads.heads.fit.blockwise import blocks
from hf_softheads.heads.forms.token_rows import TokenRows, token_rows
from hf_softheads.registry import CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.base import Head
    from hf_softheads.heads.stats import HeadStats

_EXACT = 512
_SHARE = 64  # of the vocabulary at most


@dataclass(frozen=True)
class HeadRows(EmbeddingSpec, name="head_rows"):
    """`embed(v) = weight_v row_v` with the head's own `row_v`, and the trained `w_v` for the tokens that matter most.

    What the family does with its rows, such as a multiplier, stays. `weight (V, 1)` is the least squares fit to the
    trained rows. Exact are the rows of special tokens and those whose error, times how often they are read, is largest.
    Frequencies are those of `HeadStats`; without them all tokens count the same.

    Attributes:
        exact: how many rows stay as they were; None: 512, or a 64th of a small vocabulary, or none if the head's rows
            are the trained ones.
        share_inputs: allow heads in which several tokens have one row, such as `vq`: the model cannot tell them apart.
    """

    exact: CountOrZero | None = None
    share_inputs: bool = False

    def complete(self, head: Head) -> HeadRows:
        rows = token_rows(head)
        if rows is None:
            raise ValueError(
                f"a {type(head).__name__} has no row for each token that an input embedding could read; give "
                "tie=False, and the embedding keeps a matrix of its own"
            )
        if rows.row_kind == "shared" and not self.share_inputs:
            raise ValueError(
                f"several tokens of a {type(head).__name__} have one row, so a model that reads its input there cannot "
                "tell them apart; give tie=False, or tie=embeddings.HeadRows(share_inputs=True) if that is wanted"
            )
        vocab = head.out_features
        if self.exact is None:
            few = min(_EXACT, vocab // _SHARE)
            return dataclasses.replace(self, exact=0 if rows.row_kind == "trained" else few)
        if self.exact > vocab:
            raise ValueError(
                f"head_rows asked for {self.exact} exact rows; 0 to {vocab} are possible"
            )
        return self

    def module(self, old: nn.Embedding) -> RowsEmbedding:
        return RowsEmbedding.like(old, self.exact or 0)

    @torch.no_grad()
    def fit(
        self,
        embedding: RowsEmbedding,
        weight: Tensor,
        stats: HeadStats | None,
        special: tuple[int, ...],
    ) -> None:
        often = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
        if stats is not None:
            often = stats.frequency.to(weight.device)
        missed = torch.empty_like(often)
        tokens = torch.arange(len(weight), device=weight.device)
        for which in blocks(len(weight)):
            row, trained = embedding.read(tokens[which]), weight[which].float()
            size = row.square().sum(1, keepdim=True)
            gain = torch.where(size > 0, (row * trained).sum(1, keepdim=True) / size, 1.0)
            embedding.weight[which] = gain.to(weight.dtype)
            missed[which] = (row * gain - trained).square().sum(1).double()
        matters = often * missed
        matters[list(special)] = torch.inf
        embedding.tokens.copy_(matters.topk(self.exact or 0).indices.sort().values)
        embedding.exact.copy_(weight[embedding.tokens])


class RowsEmbedding(nn.Embedding):
    """`weight (V, 1)`, the sorted `tokens (E,)` and their rows `exact (E, D)`; all other rows are the head's.

    It also has the class of the embedding that it stands for, whose `forward` may do more with the rows. The head is
    not its child, so that the head's tensors are counted, moved and saved once.
    """

    weight: nn.Parameter
    exact: nn.Parameter
    tokens: Tensor
    _head: tuple[Head] | None = None

    @classmethod
    def like(cls, old: nn.Embedding, exact: int) -> RowsEmbedding:
        """One that stands for `old` and keeps `exact` rows; not bound to a head yet."""
        new: RowsEmbedding = _stand_in(cls, old)
        matrix = old.weight
        new.weight = nn.Parameter(
            matrix.new_ones(len(matrix), 1), requires_grad=matrix.requires_grad
        )
        rows = matrix.new_zeros(exact, old.embedding_dim)
        new.exact = nn.Parameter(rows, requires_grad=matrix.requires_grad)
        new.register_buffer("tokens", torch.arange(exact, device=matrix.device))
        return new

    def bind(self, head: Head) -> None:
        """Read the rows of this head from now on."""
        self._head = (head,)
        self.num_embeddings = head.out_features

    def resize(self, vocab: int) -> RowsEmbedding:
        """Itself, for a head of another vocabulary size."""
        kept = self.weight.detach()[:vocab]
        weight = torch.cat([kept, kept.new_ones(vocab - len(kept), 1)])
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.num_embeddings = vocab
        return self

    def read(self, tokens: Tensor) -> Tensor:
        """The head's rows of `tokens (N,)`, `(N, D)` fp32, on the device of the tokens."""
        if self._head is None:
            raise RuntimeError("this embedding reads the rows of a head, but was given none")
        with _here(self._head[0]) as head:
            rows: Any = token_rows(head)
            return _embed(rows, tokens.to(head.weight.device)).to(tokens.device)

    def forward(self, input: Tensor) -> Tensor:
        flat = input.flatten()
        found = self.read(flat) * self.weight[flat]
        if len(self.tokens):
            place = torch.searchsorted(self.tokens, flat).clamp_max(len(self.tokens) - 1)
            kept = (self.tokens[place] == flat).unsqueeze(1)
            found = torch.where(kept, self.exact[place].float(), found)
        return found.to(self.weight.dtype).view(*input.shape, -1)

    def reset_parameters(self) -> None:
        """Initialise what a checkpoint did not hold."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.exact)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, exact={len(self.exact)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> RowsEmbedding:
        """A copy that reads the copy of the head, if that is being copied too; else the head itself."""
        new: RowsEmbedding = _copied(self, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._stands_for, RowsEmbedding), {**self.__dict__, "_head": None}

    _stands_for: type[nn.Embedding] = nn.Embedding


class RowsTwin(nn.Embedding):
    """Stands for another embedding that shared its matrix with the one that `first` stands for; without parameters."""

    first: tuple[RowsEmbedding]
    _stands_for: type[nn.Embedding] = nn.Embedding

    @classmethod
    def like(cls, old: nn.Embedding, first: RowsEmbedding) -> RowsTwin:
        new: RowsTwin = _stand_in(cls, old)
        new.first = (first,)
        return new

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return self.first[0].weight

    def forward(self, input: Tensor) -> Tensor:
        return RowsEmbedding.forward(self.first[0], input)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self)._stands_for, RowsTwin), self.__dict__


def _embed(rows: TokenRows, tokens: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or tokens.numel() < 2:
        return rows.embed(tokens)
    different, place = tokens.unique(return_inverse=True)  # text repeats itself
    return rows.embed(different)[place]


@contextlib.contextmanager
def _here(head: Head) -> Iterator[Head]:
    """The head with its tensors in memory, wherever accelerate keeps them between calls."""
    hooked: list[Any] = [m for m in head.modules() if "_hf_hook" in m.__dict__]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield head
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)


def _stand_in(kind: Any, old: nn.Embedding) -> Any:
    """An instance of `kind` and of `old`'s class, with everything of `old` but its matrix and what runs around it."""
    new = _blank(type(old), kind)
    for name, value in vars(old).items():
        if name not in ("forward", "_old_forward", "_hf_hook"):  # accelerate's
            new.__dict__[name] = copy.copy(value) if isinstance(value, dict | set) else value
    del new._parameters["weight"]
    return new


@functools.cache
def _both(family: Any, kind: Any) -> Any:
    """A class whose `forward` is the family's, with `kind`'s where the family calls that of `nn.Embedding`."""
    members = {"__module__": family.__module__, "__qualname__": family.__qualname__}
    return type(family.__name__, (family, kind), {**members, "_stands_for": family})


def _blank(family: Any, kind: Any) -> Any:
    cls = kind if family is nn.Embedding else _both(family, kind)
    return cls.__new__(cls)


def _copied(embedding: RowsEmbedding, memo: dict[int, Any]) -> Any:
    new = _blank(type(embedding)._stands_for, RowsEmbedding)
    memo[id(embedding)] = new
    for name, value in vars(embedding).items():
        if name != "_head":
            new.__dict__[name] = copy.deepcopy(value, memo)
    if embedding._head is not None:
        head = embedding._head[0]
        new._head = (memo.get(id(head), head),)
    return new
