"""What every classifier variant is: a spec that builds a module around the model's own classifier."""

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
