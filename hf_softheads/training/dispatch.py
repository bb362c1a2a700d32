"""Weighted losses on hidden states, each computed by the cheapest way that it and the head allow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_softheads.bridge import Function, is_hooked
from hf_softheads.heads.base import Head, LogitTransform
from hf_softheads.heads.dense import DenseHead
from hf_softheads.losses.base import (
    DivergenceLoss,
    HiddenLoss,
    LogitStatistic,
    LossSpec,
    SampledLoss,
    SummaryLoss,
)
from hf_softheads.losses.noisy_softmax import NoisySoftmax
from hf_softheads.training.fused_ce import fused_total
from hf_softheads.training.logit_moments import moments
from hf_softheads.training.token_chunks import OfTile, Scorer, candidate_logits, chunks, widened
from hf_softheads.training.two_heads import Divergences
from hf_softheads.training.vocab_blocks import blocks, blocks_per_token


class View(NamedTuple):
    """The teacher on one batch: its scores from the student's (or its own) hidden states, what it does to them, its
    hidden states, and its head where that is a plain matrix."""

    scores: Callable[[Tensor, Tensor | None], Tensor | None]
    transform: LogitTransform
    hidden: Tensor | None  # (n, Dt)
    dense: Scorer | None

    def at(self, part: slice) -> Tensor | None:
        return None if self.hidden is None else self.hidden[part]

    def states(self, hidden: Tensor) -> Tensor:
        """What its head takes, on a batch whose student has these hidden states."""
        return hidden.detach() if self.hidden is None else self.hidden

    def logits(self, scores: Tensor | None) -> Tensor | None:
        """From its scores."""
        return None if scores is None else self.transform(widened(scores))


class WeightedLosses:
    """`Σ weight · loss` of hidden states `(n, D)` under a head.

    A loss of a few numbers per token is computed in code space by a structured head, in blocks of the vocabulary or
    from moments by a dense one; a sampled loss from its rows; a divergence between two dense heads in blocks of both
    vocabularies, where the memory does not hold all scores; all others from one walk over chunks of whole logits.
    """

    def __init__(
        self,
        losses: Mapping[LossSpec, float],
        vocab: int,
        transform: LogitTransform,
        memory: int,
        backend: str | None = None,
    ):
        self.losses, self.vocab, self.transform, self.memory = losses, vocab, transform, memory
        self.backend = backend
        self.parts: dict[str, Tensor] = {}

    def total(
        self,
        head: nn.Module,
        forward: Function,
        hidden: Tensor,
        labels: Tensor,
        teacher: View,
        scale: float,
    ) -> Tensor:
        """`scale ·` the sum over tokens; `forward` is the head's own."""
        self.parts = {}
        head = _seen(head, forward)
        dense = as_matrix(head, self.transform)
        later = 1.0
        if hidden.dtype == torch.float16:
            scale, later = 1.0, scale  # p / n would underflow: scaled in the backward pass, in fp32

        if self.backend is not None and len(labels) and torch.is_grad_enabled():
            (loss,) = self.losses
            fused = fused_total(self.backend, hidden, labels, dense)
            return self._note(loss, fused) * (self.losses[loss] * scale) * later

        def add(values: Iterable[tuple[LossSpec, Tensor]]) -> Tensor:
            terms = [self._note(loss, each) * (self.losses[loss] * scale) for loss, each in values]
            return torch.stack(terms).sum()

        def of_numbers(numbers: Mapping[Any, Tensor]) -> Tensor:
            return add((k, _from_numbers(k, numbers)) for k in whole)

        def of_chunk(chunk: slice) -> OfTile:
            h, y = hidden[chunk].detach(), labels[chunk]
            scores = teacher.scores(h, teacher.at(chunk))

            def of_tile(logits: Tensor, at: slice) -> Tensor:
                theirs = teacher.logits(None if scores is None else scores[at])
                return add((k, self._value(k, h[at], logits, y[at], theirs, dense)) for k in whole)

            return of_tile

        apart = [k for k in self.losses if _needs_no_logits(k, head, dense)]
        whole = [k for k in self.losses if k not in apart]
        total = widened(hidden.new_zeros(()))
        if apart:
            total = add(
                (k, self._apart(k, hidden, labels, teacher.hidden, head, dense)) for k in apart
            )
        if not whole:
            return total * later
        needs = _needs(whole)
        summary = all(isinstance(k, SummaryLoss) for k in whole)
        pair = self._pair(whole, hidden, dense, teacher) if torch.is_grad_enabled() else None
        out: Tensor | None = None
        if dense is not None and summary and self._from_moments(dense, needs):
            out = of_numbers(moments(hidden, labels, dense.weight, self.transform.scale or 1.0))
        elif dense is not None and (summary or pair is not None):
            elements, memory = self._block(hidden, pair)
            out = blocks(
                hidden,
                labels,
                dense,
                needs,
                of_numbers,
                elements=elements,
                memory=memory,
                divergences=pair,
            )
        elif summary and isinstance(head, Head) and _has_code_space(head, needs):
            out = of_numbers(_code_space(head, hidden, labels, needs))
        if out is None:
            trained = [p for p in head.parameters() if p.requires_grad]
            if dense is None:
                rows, score = self._rows(hidden), functools.partial(self._logits, forward)
                out = chunks(hidden, trained, score, of_chunk, rows=rows)
            else:
                distilled = any(k.needs_teacher for k in whole)
                rows = self._dense_rows(hidden, teacher if distilled else None)
                out = chunks(hidden, trained, dense, of_chunk, rows=rows)
        return (total + out) * later

    def per_token(
        self, head: nn.Module, forward: Function, hidden: Tensor, labels: Tensor, teacher: View
    ) -> Tensor:
        """The weighted sum of all losses per token, `(n,)`; logits are recomputed in the backward pass."""
        self.parts = {}
        head = _seen(head, forward)
        dense = as_matrix(head, self.transform)
        whole = [k for k in self.losses if not _needs_no_logits(k, head, dense)]
        pair = self._pair(whole, hidden, dense, teacher)
        if pair is not None and dense is not None and len(whole) == len(self.losses):

            def combine(numbers: Mapping[Any, Tensor]) -> Tensor:
                weighted = [_from_numbers(k, numbers) * w for k, w in self.losses.items()]
                return torch.stack(weighted).sum(0)

            elements, _ = self._block(hidden, pair)
            return blocks_per_token(
                hidden,
                labels,
                dense,
                _needs(whole),
                combine,
                elements=elements,
                divergences=pair,
            )

        def chunk(h: Tensor, y: Tensor, start: int) -> Tensor:
            of_teacher = teacher.at(slice(start, start + len(h)))
            logits = self._logits(forward, h)
            theirs = teacher.logits(teacher.scores(h.detach(), of_teacher))
            values = [
                self._apart(k, h, y, of_teacher, head, dense)
                if _needs_no_logits(k, head, dense)
                else self._value(k, h, logits, y, theirs, dense)
                for k in self.losses
            ]
            weighted = [v * w for v, w in zip(values, self.losses.values(), strict=True)]
            return torch.stack(weighted).sum(0)

        rows = self._rows(hidden)
        parts = [
            (hidden[i : i + rows], labels[i : i + rows], i)
            for i in range(0, max(len(hidden), 1), rows)
        ]
        return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])

    def _apart(
        self,
        loss: LossSpec,
        hidden: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        head: nn.Module,
        dense: Scorer | None,
    ) -> Tensor:
        """A loss that looks at no whole logits, per token."""
        if isinstance(loss, SampledLoss):
            ids = loss.candidates(labels, self.vocab)
            if dense is not None:
                target, others = candidate_logits(hidden, labels, ids, dense, cosine=loss.cosine)
            else:
                assert isinstance(head, Head)
                target = self.transform(head.score(hidden, labels.unsqueeze(-1)).squeeze(-1))
                others = self.transform(head.subset(hidden, ids))
            return loss.from_candidates(target, others, ids, labels, self.vocab)
        assert isinstance(loss, HiddenLoss)
        assert teacher_hidden is not None
        return loss.from_hidden(widened(hidden), widened(teacher_hidden))

    def _value(
        self,
        loss: LossSpec,
        hidden: Tensor,
        logits: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        dense: Scorer | None,
    ) -> Tensor:
        """A loss of whole logits, per token."""
        if isinstance(loss, SampledLoss) and loss.cosine:
            raise ValueError(
                f"{loss.name} takes cosines with the tokens' rows, so it needs a dense head"
            )
        if isinstance(loss, NoisySoftmax) and dense is not None:
            norms = dense.weight[labels].detach().norm(dim=-1) * hidden.detach().norm(dim=-1)
            return loss.per_token(logits, labels, teacher, norms=widened(norms))
        return loss.per_token(logits, labels, teacher)

    def _note(self, loss: LossSpec, each: Tensor) -> Tensor:
        total = each.sum()
        noted = self.parts.get(loss.name)
        self.parts[loss.name] = total.detach() if noted is None else noted + total.detach()
        return total

    def _logits(self, forward: Function, hidden: Tensor) -> Tensor:
        return self.transform(widened(forward(hidden)))

    def _pair(
        self, losses: Sequence[LossSpec], hidden: Tensor, dense: Scorer | None, teacher: View
    ) -> Divergences | None:
        """The walk over the blocks of both heads; None where it is not possible, or not worth it.

        The gradients of two chunks of tokens are summed in no other memory than their own, and no score is computed
        twice.
        """
        divergences = [k for k in losses if isinstance(k, DivergenceLoss)]
        others = [k for k in losses if not isinstance(k, DivergenceLoss | SummaryLoss)]
        if not divergences or others or dense is None or teacher.dense is None:
            return None
        if len(hidden) <= 2 * self._dense_rows(hidden, teacher):
            return None
        return Divergences(divergences, teacher.dense, teacher.states(hidden))

    def _block(self, hidden: Tensor, pair: Divergences | None) -> tuple[int, int]:
        """How many scores of a head a block has, and how many bytes of blocks may be kept."""
        most = 2**24 if hidden.device.type == "cpu" else 2**26
        if pair is None:
            return self._elements(hidden, most), self.memory
        size = hidden.element_size() + pair.hidden.element_size()
        elements = min(self.memory // size, most // 2)
        return elements, self.memory - size * elements

    def _dense_rows(self, hidden: Tensor, teacher: View | None) -> int:
        """Of a chunk whose scores, and the teacher's, the memory holds."""
        theirs = 0 if teacher is None else teacher.states(hidden).element_size()
        return max(1, self.memory // (hidden.element_size() + theirs) // self.vocab)

    def _elements(self, hidden: Tensor, most: int | None = None) -> int:
        """How many logits the memory holds."""
        fits = self.memory // hidden.element_size()
        return fits if most is None else min(fits, most)

    def _rows(self, hidden: Tensor) -> int:
        """Of a chunk whose logits autograd keeps in fp32: in cache on a CPU, but enough for a matrix product."""
        rows = max(64, (2**20 if hidden.device.type == "cpu" else 2**25) // self.vocab)
        return max(1, min(rows, self._elements(hidden) // self.vocab))

    def _from_moments(self, dense: Scorer, needs: frozenset[LogitStatistic]) -> bool:
        asked = needs <= {"target", "mean", "mean_square"}
        return asked and dense.bias is None and self.transform.scale is not None


def as_matrix(head: nn.Module | Tensor | None, transform: LogitTransform) -> Scorer | None:
    """A plain matrix as tensors; None for structured, adapted or quantized heads."""
    if isinstance(head, Tensor):
        return Scorer(head, None, transform)
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if linear or isinstance(head, DenseHead):
        return Scorer(head.weight, head.bias, transform)  # type: ignore[arg-type, union-attr]
    return None


class _Hooked(nn.Module):
    """A head whose scores other code may change: nothing but calling it gives them."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head


def _seen(head: nn.Module, forward: Function) -> nn.Module:
    """The head as the losses see it, which look at its matrix or codes instead of calling it where they can."""
    return _Hooked(head) if is_hooked(head, forward) else head


def _needs_no_logits(loss: LossSpec, head: nn.Module, dense: Scorer | None) -> bool:
    if not isinstance(loss, SampledLoss):
        return isinstance(loss, HiddenLoss)
    single = isinstance(head, Head) and type(head).subset is not Head.subset
    return dense is not None or (single and not loss.cosine)


def _needs(losses: Sequence[LossSpec]) -> frozenset[LogitStatistic]:
    return frozenset(n for k in losses if isinstance(k, SummaryLoss) for n in k.needs)


def _from_numbers(loss: LossSpec, numbers: Mapping[Any, Tensor]) -> Tensor:
    """Per token."""
    return loss.from_summary(numbers) if isinstance(loss, SummaryLoss) else numbers[loss]


def _has_code_space(head: Head, needs: frozenset[LogitStatistic]) -> bool:
    """Whether the head finds these numbers in its own structure instead of from all logits."""
    return type(head).log_prob is not Head.log_prob and needs <= {"log_prob", "logsumexp"}


def _code_space(
    head: Head, hidden: Tensor, labels: Tensor, needs: frozenset[LogitStatistic]
) -> dict[LogitStatistic, Tensor]:
    numbers: dict[LogitStatistic, Tensor] = {}
    if "log_prob" in needs:
        numbers["log_prob"] = head.log_prob(hidden, labels)
    if "logsumexp" in needs:
        numbers["logsumexp"] = head.logsumexp(hidden)
    return numbers
