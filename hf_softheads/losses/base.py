"""What every loss is: a value per token from one chunk of logits, or from less than the logits where that suffices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from hf_softheads.registry import Spec

LogitStatistic = Literal["log_prob", "logsumexp", "target", "mean", "mean_square"]
Divergence = Literal["forward", "reverse"]  # KL(teacher ‖ student), KL(student ‖ teacher)


class Probabilities(NamedTuple):
    """Of some tokens, `(N, width)`, with their logarithms."""

    log: Tensor
    p: Tensor


@dataclass(frozen=True)
class LossSpec(Spec, kind="loss"):
    """A loss over the vocabulary. Shift, mask, chunking, reduction and the teacher's forward are the Objective's."""

    needs_teacher: ClassVar[bool] = False

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """`logits (N, V)` fp32, `labels (N,)`, teacher logits `(N, V)` fp32 or None, to `(N,)`. No reduction."""
        raise NotImplementedError


@dataclass(frozen=True)
class SummaryLoss(LossSpec):
    """A loss that sees the logits `z (N, V)` only through a few numbers per token, named in `needs`:

    `log_prob` = log softmax(z)[y], `logsumexp` = log Σ eᶻ, `target` = z_y, `mean` = Σz / V, `mean_square` = Σz² / V.
    They can be had without the logits: in code space, in blocks of the vocabulary, or through a Gram matrix.
    """

    needs: ClassVar[tuple[LogitStatistic, ...]] = ()

    def from_summary(self, numbers: Mapping[LogitStatistic, Tensor]) -> Tensor:
        """The numbers in `needs`, each `(N,)`, to `(N,)`."""
        raise NotImplementedError

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        return self.from_summary(summary(logits, labels, self.needs))


@dataclass(frozen=True)
class SampledLoss(LossSpec):
    """A loss that looks at the label and at a few sampled tokens, so that only their logits are computed.

    `cosine`: the logits it takes are cosines between the hidden state and the tokens' rows.
    """

    cosine: ClassVar[bool] = False

    def candidates(self, labels: Tensor, vocab: int) -> Tensor:
        """Token ids `(S,)` shared by all tokens of a chunk, drawn from torch's generator."""
        raise NotImplementedError

    def from_candidates(
        self, target: Tensor, others: Tensor, ids: Tensor, labels: Tensor, vocab: int
    ) -> Tensor:
        """Logits of the labels `(N,)` and of the candidates `(N, S)`, to `(N,)`."""
        raise NotImplementedError

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        ids = self.candidates(labels, logits.shape[-1])
        return self.from_candidates(
            pick(logits, labels), logits[:, ids], ids, labels, logits.shape[-1]
        )


@dataclass(frozen=True)
class DivergenceLoss(LossSpec):
    """A distillation loss `τ² D(s, t)` with `s, t = softmax(student / τ), softmax(teacher / τ)`, where D is a function
    of a few sums over the vocabulary.

    The sums can be found in blocks of the vocabulary, so that neither the student's nor the teacher's `(N, V)` logits
    are ever made. `equals`: the Kullback–Leibler divergence that D is, which the same walk over the vocabulary finds as
    the normalisers; None for any other D, which takes one more walk.
    """

    needs_teacher: ClassVar[bool] = True
    equals: ClassVar[Divergence | None] = None

    @property
    def temperature(self) -> float:
        """τ: a field of the variant."""
        raise NotImplementedError

    def terms(self, s: Probabilities, t: Probabilities) -> tuple[Tensor, ...]:
        """What is summed over the vocabulary, `(N, width)` each, for the tokens given."""
        raise NotImplementedError

    def from_sums(self, sums: tuple[Tensor, ...]) -> Tensor:
        """The sums of the terms over all tokens, `(N,)` each, to D `(N,)`."""
        return sums[0]

    def gradient(self, s: Probabilities, t: Probabilities, sums: tuple[Tensor, ...]) -> Tensor:
        """`∂D / ∂(student / τ)` for the tokens given, `(N, width)`; `sums` are `(N, 1)`."""
        raise NotImplementedError

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        t = (with_teacher(self, teacher) / self.temperature).log_softmax(-1)
        s = (logits / self.temperature).log_softmax(-1)
        terms = self.terms(Probabilities(s, s.exp()), Probabilities(t, t.exp()))
        return self.from_sums(tuple(term.sum(-1) for term in terms)) * self.temperature**2


@dataclass(frozen=True)
class HiddenLoss(LossSpec):
    """A distillation loss between last hidden states; it looks at no logits and needs another model as teacher."""

    needs_teacher: ClassVar[bool] = True

    def from_hidden(self, hidden: Tensor, teacher: Tensor) -> Tensor:
        """Hidden states `(N, D)` of the student and of the teacher, fp32, to `(N,)`."""
        raise NotImplementedError

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """The same formula over whatever vectors are given."""
        return self.from_hidden(logits, with_teacher(self, teacher))


def pick(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits[n, labels[n]]`, `(N,)`."""
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def summary(
    logits: Tensor, labels: Tensor, needs: tuple[LogitStatistic, ...] | frozenset[LogitStatistic]
) -> dict[LogitStatistic, Tensor]:
    """The numbers that summary losses ask for, from whole logits `(N, V)`: the definition of each."""
    numbers: dict[LogitStatistic, Tensor] = {}
    if "target" in needs or "log_prob" in needs:
        numbers["target"] = pick(logits, labels)
    if "logsumexp" in needs or "log_prob" in needs:
        numbers["logsumexp"] = logits.logsumexp(-1)
    if "log_prob" in needs:
        numbers["log_prob"] = numbers["target"] - numbers["logsumexp"]
    if "mean" in needs:
        numbers["mean"] = logits.mean(-1)
    if "mean_square" in needs:
        numbers["mean_square"] = logits.square().mean(-1)
    return numbers


def with_teacher(loss: LossSpec, teacher: Tensor | None) -> Tensor:
    """The teacher's logits, or a ValueError that says that this loss needs a teacher."""
    if teacher is None:
        raise ValueError(
            f"the loss {loss.name!r} compares with a teacher; pass Objective(…, teacher=…): a dense matrix "
            "(V, D) for the same hidden states, a head module, or another model of the same vocabulary"
        )
    return teacher


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`Σ_v p_v (log p_v − log q_v)` from log-probabilities `(N, V)`, to `(N,)`."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
