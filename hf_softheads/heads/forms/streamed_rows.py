"""Heads whose rows are rebuilt a block at a time: `score_v = row_v · prepare(h) + bias_v`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_softheads.heads import base
from hf_softheads.heads.base import Head
from hf_softheads.heads.forms.largest import by_two_passes
from hf_softheads.heads.forms.sampling import check_temperature
from hf_softheads.heads.forms.token_numbers import over_blocks
from hf_softheads.heads.forms.token_rows import RowKind
from hf_softheads.heads.forms.trainable_codes import Additive

_BLOCK = 4096  # rows rebuilt at once


class RowsHead(Head):
    """A head that stores its rows in another form and rebuilds `_BLOCK` of them at a time.

    A variant implements `rows`, and `prepare` where its rows live in other coordinates than h. All methods stream
    over the vocabulary: the whole matrix never exists, nor do the logits of many tokens, and the backward pass
    rebuilds the rows again. A variant that keeps its rows in another order than the tokens' says so by `token_of_row`.
    One whose integer codes can be trained implements `unpacked` and `pack`, and rounds `latent` in `rows` where it is
    set.
    """

    code_lr = 0.0
    row_kind: RowKind = "rebuilt"

    def __init__(self, dim: int, vocab: int, *, bias: bool):
        super().__init__(dim, vocab)
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None  # in the order of the rows
        self.latent: Tensor | None = (
            None  # the codes as real numbers, between `relax_codes` and `round_codes`
        )

    def token_of_row(self) -> Tensor | None:
        """Token of each row, `(V,)` int64; None where that is the row's own number."""
        return None

    def rows(self, which: slice | Tensor) -> Tensor:
        """Some rows, `(n, K)`; differentiable in the parameters."""
        raise NotImplementedError

    def score(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        places = self.row_of_token()
        where = tokens if places is None else places[tokens].long()
        scores = products(self.rows, self.prepare(hidden), where)
        return scores if self.bias is None else scores + self.bias[where]

    def subset(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        places = self.row_of_token()
        where = tokens if places is None else places[tokens].long()
        x = self.prepare(hidden)
        scores = F.linear(x, self.rows(where).to(x.dtype)).float()
        return scores if self.bias is None else scores + self.bias[where]

    def repair_lr(self, parameter: Tensor) -> float:
        return rate_by_size(parameter)

    def additive(self) -> Additive | None:
        return None

    def unpacked(self) -> Tensor | None:
        """All integer codes, `(V, …)`, in the order of the rows; None if repair cannot train them."""
        return None

    def pack(self, codes: Tensor) -> None:
        """Store what `unpacked` gives."""
        raise NotImplementedError

    def relax_codes(self) -> list[Tensor]:
        codes = self.unpacked()
        if codes is None:
            return []
        self.latent = codes.float().requires_grad_()
        return [self.latent]

    @torch.no_grad()
    def round_codes(self) -> None:
        if self.latent is not None:
            codes = self.latent.round().clamp_min(0)
            self.latent = None
            self.pack(codes)

    def prepare(self, hidden: Tensor) -> Tensor:
        """Hidden states `(…, D)` in the coordinates of the rows, `(…, K)`."""
        return hidden

    def embed(self, tokens: Tensor) -> Tensor:
        places = self.row_of_token()
        rows = self.rows(tokens if places is None else places[tokens].long()).float()
        return rows if type(self).prepare is RowsHead.prepare else rows @ self._axes()

    def _axes(self) -> Tensor:
        """What `prepare` multiplies hidden states by, transposed: `(K, D)` fp32."""
        unit = torch.eye(self.in_features, dtype=self.weight.dtype, device=self.weight.device)
        return self.prepare(unit).float().T

    def dense(self) -> tuple[Tensor, Tensor | None] | None:
        rows = torch.cat([self.rows(slice(*ends)).float() for ends in self.blocks()])
        matrix = rows @ self._axes()
        bias: Tensor | None = self.bias
        places = self.row_of_token()
        if places is not None:
            matrix = matrix.index_select(0, places)
            bias = None if bias is None else bias[places]
        return matrix, None if bias is None else bias.float()

    def scores(self, hidden: Tensor) -> Tensor:
        x = self.prepare(hidden)
        parts = [self._remember(self._block, x, start, stop) for start, stop in self.blocks()]
        scores = torch.cat(parts, -1)
        places = self.row_of_token()
        return scores if places is None else scores.index_select(-1, places)

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        places = self.row_of_token()
        place = labels if places is None else places[labels].long()
        total, picked = self._stream(hidden, place)
        return picked - total

    def logsumexp(self, hidden: Tensor) -> Tensor:
        return self._stream(hidden, hidden.new_zeros(hidden.shape[:-1], dtype=torch.long))[0]

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        transform, places = self._known_transform(), self.row_of_token()
        place = (labels if places is None else places[labels].long()).reshape(-1)

        def block(x: Tensor, start: int, stop: int) -> Tensor:
            return transform(self._block(x, start, stop)) / temperature

        flat = hidden.reshape(-1, hidden.shape[-1])
        tokens = max(1, base._CHUNK_ELEMENTS // min(_BLOCK, self.out_features))
        spans = list(self.blocks())
        found = torch.cat(
            [
                over_blocks(block, spans, spans, self.prepare(h), y, moments)
                for h, y in zip(flat.split(tokens), place.split(tokens), strict=True)
            ]
        )
        if (order := self.token_of_row()) is not None:
            log_prob, entropy, best, *rest = found.unbind(-1)
            best = order[best.detach().long()].to(found.dtype)
            found = torch.stack([log_prob, entropy, best, *rest], -1)
        return found.view(*labels.shape, found.shape[-1])

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        transform = self._known_transform()
        x = self.prepare(hidden)
        values = torch.full((*hidden.shape[:-1], 0), -torch.inf, device=hidden.device)
        places = torch.zeros(values.shape, dtype=torch.long, device=hidden.device)
        for start, stop in self.blocks():
            new, where = transform(self._block(x, start, stop)).topk(min(k, stop - start), -1)
            values, places = torch.cat([values, new], -1), torch.cat([places, where + start], -1)
            values, kept = values.topk(min(k, values.shape[-1]), -1)
            places = places.gather(-1, kept)
        return values, self._tokens(places)

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        if hidden.shape[:-1].numel() * self.out_features <= base._CHUNK_ELEMENTS:
            return super().topk_logsumexp(hidden, k, temperature)
        return by_two_passes(self, hidden, k, temperature)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        check_temperature(temperature)
        transform = self._known_transform()
        x = self.prepare(hidden)
        best = torch.full(hidden.shape[:-1], -torch.inf, device=hidden.device)
        place = torch.zeros(best.shape, dtype=torch.long, device=hidden.device)
        for start, stop in self.blocks():
            z = transform(self._block(x, start, stop)) / temperature
            noise = torch.empty_like(z).exponential_(generator=generator)
            value, where = (z - noise.log_()).max(
                -1
            )  # Gumbel-max over blocks is Gumbel-max over all
            place = torch.where(value > best, where + start, place)
            best = torch.maximum(value, best)
        return self._tokens(place)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that are rebuilt together."""
        for start in range(0, self.out_features, _BLOCK):
            yield start, min(start + _BLOCK, self.out_features)

    def _block(self, x: Tensor, start: int, stop: int) -> Tensor:
        scores = F.linear(x, self.rows(slice(start, stop)).to(x.dtype)).float()
        return scores if self.bias is None else scores + self.bias[start:stop]

    def _stream(self, hidden: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """`logsumexp` of the logits and the logit at `place`, `(…)` fp32 both."""
        transform = self._known_transform()

        def part(x: Tensor, place: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            z = transform(self._block(x, start, stop))
            inside = (place >= start) & (place < stop)
            where = (place - start).clamp(0, stop - start - 1).unsqueeze(-1)
            return z.logsumexp(-1), torch.where(inside, z.gather(-1, where).squeeze(-1), 0)

        shape = hidden.shape[:-1]
        totals, picks = [], []
        tokens = max(1, base._CHUNK_ELEMENTS // min(_BLOCK, self.out_features))
        flat = hidden.reshape(-1, hidden.shape[-1])
        for h, y in zip(flat.split(tokens), place.reshape(-1).split(tokens), strict=True):
            x = self.prepare(h)
            total = torch.full(y.shape, -torch.inf, device=x.device)
            picked = torch.zeros_like(total)
            for start, stop in self.blocks():
                mass, pick = self._remember(part, x, y, start, stop)
                total, picked = torch.logaddexp(total, mass), picked + pick
            totals.append(total)
            picks.append(picked)
        return torch.cat(totals).reshape(shape), torch.cat(picks).reshape(shape)

    def _remember(self, function, *arguments):  # type: ignore[no-untyped-def]
        """Call a function whose backward pass recomputes it, so that rebuilt rows are not kept."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _tokens(self, rows: Tensor) -> Tensor:
        order = self.token_of_row()
        return rows if order is None else order[rows]

    def row_of_token(self) -> Tensor | None:
        """Row of each token, `(V,)` int32: the inverse of `token_of_row`."""
        order = self.token_of_row()
        if order is None:
            return None
        return self._derived("places", lambda: order.argsort().int(), order)


def rate_by_size(parameter: Tensor) -> float:
    """A hundredth of the parameter's size: scales and offsets differ by orders of magnitude."""
    return 0.01 * max(float(parameter.detach().float().square().mean().sqrt()), 1e-4)


def products(rows: Callable[[Tensor], Tensor], x: Tensor, where: Tensor) -> Tensor:
    """`rows(where) · x` in fp32: `x (…, K)`, `where (…, M)`, other rows for each state → `(…, M)`."""
    training = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if training or x.device.type != "cpu" or x.ndim < 2 or not x.numel():
        found = rows(where.flatten()).view(*where.shape, x.shape[-1])
        return (found.float() @ x.float().unsqueeze(-1)).squeeze(-1)
    # One state at a time: the copies of its rows stay in the cache.
    pairs = zip(where.flatten(0, -2), x.float().flatten(0, -2), strict=True)
    return torch.stack([torch.mv(rows(w).float(), state) for w, state in pairs]).view(where.shape)
