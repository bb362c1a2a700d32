"""Statistics of a model's last hidden states: what a fit needs to know about the data."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_softheads.files import replacing

FORMAT = 1
_CONTEXTS = "contexts."  # before the names of what is saved of `HeadStats.contexts`
_SMOOTHING = 0.1
TOKENS_PER_DIM = 16  # below which a fit in the metric of the hidden states is doubtful


def softmax_curvature(probabilities: Tensor) -> Tensor:
    """`p̃ (1 - p̃)`, `p̃ = 0.9 p + 0.1 / V`: `(S, V)` probabilities, which are overwritten → `(S, V)`.

    How much an error of a logit matters to the loss; smoothed, so that rare tokens matter too.
    """
    p = probabilities.mul_(1 - _SMOOTHING).add_(_SMOOTHING / probabilities.shape[-1])
    return p * (1 - p)


@dataclass(frozen=True)
class HeadStats:
    """Statistics of hidden states `h` (what the head sees) and of the dense head's probabilities `p(·|h)`.

    Attributes:
        second_moment: `E[h hᵀ]`, `(D, D)` float64.
        mean: `E[h]`, `(D,)` float64.
        token_counts: how often each token was the next token, `(V,)` int64.
        mean_prob: `E[p]`, `(V,)` float32: a smooth, strictly positive unigram estimate.
        curvature: `λ̃ = E[p̃(1-p̃)]`, `p̃ = 0.9 p + 0.1 / V`, `(V,)` float32: how much each row's error matters.
        prob_weighted_mean: `E[p_v h] / E[p_v]`, `(V, D)` bfloat16: the hidden state at which token v is likely.
        states: a uniform sample of hidden states, `(S, D)` float32.
        labels: the next token of each sampled state, `(S,)` int64.
        tokens: how many hidden states were seen.
        contexts: what `local_moments` found for the head that these statistics are of, so that every fit with them
            finds it at once; saved with the rest.
    """

    second_moment: Tensor
    mean: Tensor
    token_counts: Tensor
    mean_prob: Tensor
    curvature: Tensor
    prob_weighted_mean: Tensor
    states: Tensor
    labels: Tensor
    tokens: int
    provenance: dict[str, str] = field(default_factory=dict)
    contexts: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def dim(self) -> int:
        return self.second_moment.shape[0]

    @property
    def vocab(self) -> int:
        return self.token_counts.shape[0]

    @property
    def frequency(self) -> Tensor:
        """Token counts plus one token's worth of `mean_prob`, so that none is 0, `(V,)` float64."""
        return self.token_counts.double() + self.mean_prob.double()

    @property
    def covariance(self) -> Tensor:
        """`E[(h - E h)(h - E h)ᵀ]`, `(D, D)` float64."""
        return self.second_moment - torch.outer(self.mean, self.mean)

    def check(self, dim: int, vocab: int, least: int = 0) -> None:
        """Raise ValueError unless these statistics are finite and of a head `(vocab, dim)`; warn if they saw too few
        tokens, or less than `least`."""
        if (self.dim, self.vocab) != (dim, vocab):
            raise ValueError(
                f"these statistics are of a model with hidden size {self.dim} and {self.vocab} tokens, the head "
                f"has hidden size {dim} and {vocab} tokens; run sh.collect on this model"
            )
        for entry in fields(self):
            tensor = getattr(self, entry.name)
            if isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"these statistics hold NaN or infinite values in {entry.name}; run sh.collect again on this model"
                )
        if self.tokens < (needed := max(least, TOKENS_PER_DIM * dim)):
            warnings.warn(
                f"these statistics saw {self.tokens:,} tokens; to be dependable for hidden states of size {dim} "
                f"they need about {needed:,}: run sh.collect on more text",
                stacklevel=_users_level(),
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: to a temporary name first, then renamed."""
        path = Path(path)
        tensors = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        tensors |= {_CONTEXTS + name: tensor for name, tensor in self.contexts.items()}
        header = {
            "format": str(FORMAT),
            "tokens": str(self.tokens),
            "provenance": json.dumps(self.provenance),
        }
        with replacing(path) as fresh:
            save_file({k: v.contiguous() for k, v in tensors.items()}, fresh, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> HeadStats:
        """Read what `save` wrote. Raises ValueError for a file of another kind or a newer format."""
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if "tokens" not in header or int(header.get("format", "0")) > FORMAT:
                raise ValueError(
                    f"{path} holds no head statistics of format {FORMAT} or older: {header}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        contexts = {
            name.removeprefix(_CONTEXTS): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_CONTEXTS)
        }
        loaded = cls(
            **tensors, tokens=int(header["tokens"]), provenance=json.loads(header["provenance"])
        )
        loaded.contexts.update(contexts)
        return loaded


def _users_level() -> int:
    """The `stacklevel` at which a warning of this module points to the line outside the package that led to it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "hf_softheads",
        "torch",  # torch.no_grad as a decorator
    ):
        frame, level = frame.f_back, level + 1
    return level


def check_stats(stats: object) -> None:
    """Raise TypeError unless these are statistics."""
    if not isinstance(stats, HeadStats):
        raise TypeError(
            f"stats are what sh.collect(model, text) returns, got {type(stats).__name__}"
        )
