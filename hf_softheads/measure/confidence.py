"""How sure a model is of its most likely token, and how well that ranks its mistakes.

    scores = sh.confidence.msp(logits)
    print(sh.confidence.risk_coverage(scores, logits.argmax(-1) == labels).aurc)

Every score takes logits `(…, V)` and gives `(…)` in fp32, larger for surer. They follow the logits, not the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def msp(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`max_v softmax(z / T)_v`, the maximum softmax probability (arXiv 1610.02136)."""
    _check("temperature", temperature)
    return (logits.float() / temperature).softmax(-1).amax(-1)


def max_logit(logits: Tensor) -> Tensor:
    """`max_v z_v`."""
    return logits.float().amax(-1)


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`T log Σ_v exp(z_v / T)`, the negative energy (arXiv 2010.03759)."""
    _check("temperature", temperature)
    return temperature * (logits.float() / temperature).logsumexp(-1)


def p_norm(logits: Tensor, p: float = 2.0) -> Tensor:
    """`max_v z̄_v / ‖z̄‖_p`, `z̄ = z - mean(z)`: the largest logit by the size of all (arXiv 2305.15508, 2403.14715).

    Published to repair the ranking of classifiers trained with label smoothing. Choose `p` on validation data, see
    `best_setting`.
    """
    _check("p", p)
    centred = logits.float()
    centred = centred - centred.mean(-1, keepdim=True)
    centred = centred / centred.abs().amax(-1, keepdim=True).clamp_min(1e-30)  # no overflow in ^p
    size: Tensor = centred.norm(p=p, dim=-1).clamp_min(1e-30)
    return centred.amax(-1) / size


def margin(logits: Tensor) -> Tensor:
    """`p_(1) - p_(2)`, the lead of the likeliest token's probability over the next one's."""
    best = logits.float().softmax(-1).topk(2, -1).values
    return best[..., 0] - best[..., 1]


def entropy(logits: Tensor) -> Tensor:
    """`Σ_v p_v log p_v`, the negative entropy in nats."""
    log_p = logits.float().log_softmax(-1)
    return (log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def gini(logits: Tensor) -> Tensor:
    """`-(1 - Σ p²) / Σ p²`, DOCTOR's score (arXiv 2106.02395): `1 - 1 / Σ p²`, at most 0."""
    return 1 - 1 / logits.float().softmax(-1).square().sum(-1)


@dataclass(frozen=True)
class Relative:
    """`-pᵀ D p`, D large for pairs of tokens that are likely together where the model is wrong (REL-U, 2306.01710).

    `D = relu(λ E₋[p pᵀ] - (1 - λ) E₊[p pᵀ])` with diagonal 0, over its Frobenius norm, from the probabilities of wrong
    (−) and right (+) answers. Of a large vocabulary the `tokens` likeliest have places of their own, all others one.

    Attributes:
        matrix: D, `(M, M)`.
        tokens: tokens with a place of their own, `(M - 1,)`, or `(M,)` where none is left.
        temperature: of the softmax.
    """

    matrix: Tensor
    tokens: Tensor
    temperature: float = 1.0

    @classmethod
    def fit(
        cls,
        logits: Tensor,
        correct: Tensor,
        *,
        weight: float = 0.5,
        temperature: float = 1.0,
        tokens: int = 512,
    ) -> Relative:
        """From validation logits `(N, V)` and whether each answer was right `(N,)`, bool.

        `weight` is λ. Where no pair is likelier among the wrong answers, the score is `gini`'s order: `D = 1 - I`.

        Raises:
            ValueError: no right or no wrong answer among them, λ outside [0, 1], fewer than two tokens.
        """
        _check("temperature", temperature)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight (λ) must be 0 to 1, got {weight}")
        if correct.dtype != torch.bool or correct.shape != logits.shape[:1]:
            raise ValueError(
                f"correct must be bool of shape {tuple(logits.shape[:1])}, got {correct.dtype} of "
                f"{tuple(correct.shape)}"
            )
        if tokens < 2 or bool(correct.all()) or not bool(correct.any()):
            raise ValueError(
                f"needs 2 tokens or more, right answers and wrong ones; got {tokens} tokens and {int(correct.sum())} "
                f"right of {len(correct)}"
            )
        p = (logits.float() / temperature).softmax(-1)
        chosen = p.mean(0).topk(min(tokens, p.shape[-1])).indices.sort().values
        p = _with_rest(p, chosen)
        right, wrong = (_second_moment(p[which]) for which in (correct, ~correct))
        matrix = (weight * wrong - (1 - weight) * right).relu().fill_diagonal_(0)
        if not bool(matrix.any()):
            matrix = torch.ones_like(matrix).fill_diagonal_(0)
        return cls(matrix / matrix.norm(), chosen, temperature)

    def __call__(self, logits: Tensor) -> Tensor:
        """The score of logits `(…, V)`."""
        p = _with_rest((logits.float() / self.temperature).softmax(-1), self.tokens)
        return -((p @ self.matrix) * p).sum(-1)


def _second_moment(p: Tensor) -> Tensor:
    return p.T @ p / len(p)


def _with_rest(p: Tensor, tokens: Tensor) -> Tensor:
    """Probabilities of some tokens and of all others together, which is left out where there are none."""
    own = p.index_select(-1, tokens)
    if len(tokens) == p.shape[-1]:
        return own
    return torch.cat([own, (1 - own.sum(-1, keepdim=True)).clamp_min(0)], -1)


def trust(states: Tensor, answers: Tensor, exemplars: Tensor, labels: Tensor) -> Tensor:
    """Distance to the nearest exemplar of another label over that to the nearest of the answer's (arXiv 1805.11783).

    Args:
        states: hidden states `(N, D)`, and `answers (N,)` given from them.
        exemplars: states `(M, D)` whose true `labels (M,)` are known.

    Raises:
        ValueError: an answer has no exemplar, or there is only one label.
    """
    if len(labels.unique()) < 2:
        raise ValueError("exemplars of one label alone: there is no other label to be far from")
    if missing := sorted(set(answers.tolist()) - set(labels.tolist())):
        raise ValueError(
            f"no exemplar of {len(missing)} answers such as {missing[:3]}; leave such items out or add exemplars"
        )
    found = []
    for x, answer in zip(states.float().split(1024), answers.split(1024), strict=True):
        distance = torch.cdist(x, exemplars.float())
        same = labels == answer.unsqueeze(-1)
        near = distance.masked_fill(~same, torch.inf).amin(-1)
        far = distance.masked_fill(same, torch.inf).amin(-1)
        found.append(far / near.clamp_min(1e-12))
    return torch.cat(found)


@dataclass(frozen=True)
class RiskCoverage:
    """What a model risks when it answers only where it is surest.

    Attributes:
        coverage: shares of the items that are answered, `1/N … 1`.
        risk: mean loss of those; items of equal confidence each count as their mean.
        aurc: mean of `risk`: the area under the curve.
        best: the same if the confidence ranked by the loss itself; `aurc - best` is what ranking could still win.
    """

    coverage: Tensor
    risk: Tensor
    aurc: float
    best: float

    @property
    def excess(self) -> float:
        """`aurc - best`."""
        return self.aurc - self.best

    def at(self, coverage: float) -> float:
        """Risk at a coverage in (0, 1]."""
        if not 0 < coverage <= 1:
            raise ValueError(f"a coverage lies above 0 and at most at 1, got {coverage}")
        return float(self.risk[max(0, round(coverage * len(self.risk)) - 1)])


def risk_coverage(confidence: Tensor, correct: Tensor) -> RiskCoverage:
    """The risk–coverage curve of confidences `(N,)`.

    Args:
        correct: `(N,)`: bool, whether each answer is right; or float, the loss of each.

    Raises:
        ValueError: nothing, shapes that differ, or NaN among the numbers.
    """
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"expected two vectors of one length, got {tuple(confidence.shape)} and {tuple(correct.shape)}"
        )
    loss = (~correct).double() if correct.dtype == torch.bool else correct.double()
    if bool(confidence.isnan().any() | loss.isnan().any()):
        raise ValueError("NaN among the confidences or losses: they cannot be ranked")
    risk = _running_mean(loss, -confidence.double())
    share = torch.arange(1, len(loss) + 1, dtype=torch.float64, device=loss.device) / len(loss)
    best = _running_mean(loss, loss)
    return RiskCoverage(share.cpu(), risk.cpu(), float(risk.mean()), float(best.mean()))


def best_setting(
    score: Callable[[Tensor, float], Tensor],
    logits: Tensor,
    correct: Tensor,
    settings: Iterable[float],
) -> float:
    """The setting (`p` of `p_norm`, `temperature` of `msp` …) with the least AURC on validation logits `(N, V)`."""
    return min(
        (float(s) for s in settings),
        key=lambda s: risk_coverage(score(logits, s), correct).aurc,
    )


def _check(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _running_mean(loss: Tensor, key: Tensor) -> Tensor:
    """Means of the losses of least key; equal keys count as their mean loss, whatever their order."""
    order = key.argsort(stable=True)
    _, group = key[order].unique_consecutive(return_inverse=True)
    count = torch.bincount(group).double()
    mean = torch.zeros_like(count).index_add_(0, group, loss[order]) / count
    total = mean[group].cumsum(0)
    return total / torch.arange(1, len(loss) + 1, dtype=torch.float64, device=loss.device)
