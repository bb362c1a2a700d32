"""A pooled head for sequence classifiers: attention over all tokens beside the one that the model reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.registry import Spec


@dataclass(frozen=True)
class ClassifierSpec(Spec, kind="classifier"):
    """A variant of a sequence classifier's last module, for `AutoModelForSequenceClassification`."""

    def check(self, dim: int, labels: int) -> None:
        """Raise ValueError if the fields make no sense for hidden states of size `dim`."""

    def module(self, dim: int, labels: int, inner: nn.Module) -> PooledClassifier:
        """An uninitialised module around the model's own classifier; works under `torch.device("meta")`."""
        raise NotImplementedError


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

    heads: int = 1

    def check(self, dim: int, labels: int) -> None:
        if self.heads < 1 or dim % self.heads:
            near = [n for n in range(1, dim + 1) if dim % n == 0]
            best = min(near, key=lambda n: abs(n - self.heads))
            raise ValueError(
                f"softpool asked for {self.heads} heads, which do not divide hidden states of size {dim}; "
                f"{best} would"
            )

    def module(self, dim: int, labels: int, inner: nn.Module) -> PooledClassifier:
        return PooledClassifier(dim, labels, self.heads, inner)


class PooledClassifier(nn.Module):
    """`inner`, the model's own classifier, and `query (heads, D)`, `sharpness (D,)`, `weight (labels, D)`.

    The hidden states and which of them are no padding come from the model's forward, which sets `seen` meanwhile.
    """

    keep_in_fp32: tuple[str, ...] = ()

    def __init__(self, dim: int, labels: int, heads: int, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.query = nn.Parameter(torch.empty(heads, dim))
        self.sharpness = nn.Parameter(torch.empty(dim))
        self.weight = nn.Parameter(torch.empty(labels, dim))
        self.seen: tuple[Tensor, Tensor] | None = None

    def reset_parameters(self) -> None:
        for parameter in (self.query, self.sharpness, self.weight):
            nn.init.zeros_(parameter)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        logits: Tensor = self.inner(*args, **kwargs)
        if self.seen is None:
            raise RuntimeError(
                "this classifier pools the hidden states of the model's own forward; call the model, not its classifier"
            )
        pooled = self.pool(*self.seen)
        more = F.linear(pooled.to(self.weight.dtype), self.weight).to(logits.dtype)
        # decoders classify every position and pick one afterwards
        return logits + (more if logits.ndim == 2 else more.unsqueeze(1))

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """`hidden (B, T, D)`, `mask (B, T)` true for real tokens → `(B, D)` fp32; 0 for a row without tokens."""
        hidden = hidden.float()
        dim = hidden.shape[-1]
        scores = F.linear(hidden, self.query.float()) * dim**-0.5
        scores = scores.repeat_interleave(dim // len(self.query), -1)
        scores = scores + self.sharpness.float() * hidden
        lowest = torch.finfo(scores.dtype).min
        share = scores.masked_fill(~mask.unsqueeze(-1), lowest).softmax(1)
        share = share * mask.unsqueeze(-1)
        pooled: Tensor = (share * hidden).sum(1)
        return pooled

    def extra_repr(self) -> str:
        return f"labels={len(self.weight)}, heads={len(self.query)}"
