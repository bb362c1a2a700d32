"""A pooled head for sequence classifiers: attention over all tokens beside the one that the model reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_softheads.classifiers.base import ClassifierSpec, PooledClassifier
from hf_softheads.registry import Count


@dataclass(frozen=True)
class SoftPool(ClassifierSpec, name="softpool"):
    """`logits = classifier(x) + weight · p`, `p_d = Σ_s softmax_s(query_i · h_s / √D + sharpness_d h_sd) h_sd`.

    i is the slice of channel d, `h_s (D,)` are the last hidden states of all tokens but padding, and `classifier(x)` is
    the model's own, which reads one of them (the last token, or `[CLS]`). With `sharpness = 0` this is attention
    pooling by learned queries, one for each of `heads` slices of the hidden state (Lin et al., arXiv 1703.03130); with
    `query = 0` it is SoftPool (Stergiou et al., arXiv 2101.00440), between the mean (0) and the maximum (∞) of each
    channel. `weight` starts at 0: a trained classifier gives exactly what it gave until it is trained further.

    Attributes:
        heads: slices of the hidden state, each with a query of its own; divides D.
    """

    heads: Count = 1

    def check(self, dim: int, labels: int) -> None:
        if dim % self.heads:
            near = [n for n in range(1, dim + 1) if dim % n == 0]
            best = min(near, key=lambda n: abs(n - self.heads))
            raise ValueError(
                f"softpool asked for {self.heads} heads, which do not divide hidden states of size {dim}; "
                f"{best} would"
            )

    def module(self, dim: int, labels: int, inner: nn.Module) -> PooledClassifier:
        return PooledClassifier(dim, labels, self.heads, inner)
