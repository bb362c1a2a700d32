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
