"""Calibration statistics of a model's last hidden states: what a fit needs to know about the data."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads import bridge
from hf_softheads.data import windows
from hf_softheads.heads.base import Head

FORMAT = 1
_SMOOTHING = 0.1  # ε of p̃ in the curvature
_CHUNK_ELEMENTS = 2**24  # probabilities held at once
TOKENS_PER_DIM = 16  # below which a fit in the metric of the hidden states is doubtful


@dataclass(frozen=True)
class HeadStats:
    """Statistics of hidden states `h` (what the head sees) and of the dense head's probabilities `p(·|h)`.

    Attributes:
        second_moment: `E[h hᵀ]`, `(D, D)` float64.
        mean: `E[h]`, `(D,)` float64.
        token_counts: how often each token was the next token, `(V,)` int64.
        mean_prob: `E[p]`, `(V,)` float32: a smooth, strictly positive unigram estimate.
        curvature: `λ̃ = E[p̃(1-p̃)]`, `p̃ = 0.9 p + 0.1 / V`, `(V,)` float32: how much each row's error matters.
        prob_weighted_mean: `E[p_v h] / E[p_v]`, `(V, D)` float32: the hidden state at which token v is likely.
        states: a uniform sample of hidden states, `(S, D)` float32.
        labels: the next token of each sampled state, `(S,)` int64.
        tokens: how many hidden states were seen.
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
        """Raise ValueError unless these statistics fit a head `(vocab, dim)`; warn if they saw too few tokens, or less
        than `least`."""
        if (self.dim, self.vocab) != (dim, vocab):
            raise ValueError(
                f"these statistics are of a model with hidden size {self.dim} and {self.vocab} tokens, the head "
                f"has hidden size {dim} and {vocab} tokens; run sh.collect on this model"
            )
        if self.tokens < (needed := max(least, TOKENS_PER_DIM * dim)):
            warnings.warn(
                f"these statistics saw {self.tokens:,} tokens; to be dependable for hidden states of size {dim} "
                f"they need about {needed:,}: run sh.collect on more text",
                stacklevel=3,
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: to a temporary name first, then renamed."""
        path = Path(path)
        tensors = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("tokens", "provenance")
        }
        fresh = path.with_name(path.name + ".writing")
        header = {
            "format": str(FORMAT),
            "tokens": str(self.tokens),
            "provenance": json.dumps(self.provenance),
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, fresh, metadata=header)
        fresh.rename(path)

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
        return cls(
            **tensors, tokens=int(header["tokens"]), provenance=json.loads(header["provenance"])
        )


@torch.no_grad()
def collect(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    window: int = 512,
    batch_size: int = 8,
    states: int = 16_384,
    seed: int = 0,
) -> HeadStats:
    """Statistics of a dense model's hidden states and probabilities, in one streaming pass.

    Holds no more than a chunk of logits; padding is left out. Memory: `(D, D)` in fp64, `(V, D)` in fp32 and the
    sampled states.

    Args:
        model: the model before its head is patched.
        data: text, files, a `datasets` object or tokens; see `hf_softheads.data.windows`.
        tokenizer: needed for text.
        states: how many hidden states to keep, sampled uniformly under `seed`.

    Raises:
        ValueError: a model without a head, an already patched head, empty data.
    """
    reader = bridge.Reader(model)
    if isinstance(reader.head, Head):
        raise ValueError(
            "this model's head is patched already; collect statistics from the original model"
        )
    rows = windows(data, tokenizer, window=window)
    device = reader.head.weight.device
    vocab, dim = reader.head.weight.shape
    second = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    mean = torch.zeros(dim, dtype=torch.float64, device=device)
    counts = torch.zeros(vocab, dtype=torch.long, device=device)
    mean_prob = torch.zeros(vocab, dtype=torch.float64, device=device)
    curvature = torch.zeros_like(mean_prob)
    weighted = torch.zeros(vocab, dim, device=device)
    sample = _Reservoir(states, seed)
    chunk = max(1, _CHUNK_ELEMENTS // vocab)
    seen = 0
    was_training = model.training
    model.eval()
    try:
        total = -(-len(rows.input_ids) // batch_size)
        for batch in tqdm(rows.batches(batch_size), total=total, desc="collect", disable=None):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            keep = labels != -100
            hidden = reader.hidden(**batch)[:, :-1][keep]
            labels = labels[keep]
            seen += len(labels)
            exact = hidden.double()
            second += exact.T @ exact
            mean += exact.sum(0)
            counts += torch.bincount(labels, minlength=vocab)
            sample.add(hidden.float().cpu(), labels.cpu())
            for part in hidden.split(chunk):
                p = reader.logits(part).softmax(-1)
                mean_prob += p.sum(0, dtype=torch.float64)
                weighted.addmm_(p.T, part.float())
                p = p.mul_(1 - _SMOOTHING).add_(_SMOOTHING / vocab)
                curvature += (p * (1 - p)).sum(0, dtype=torch.float64)
    finally:
        model.train(was_training)
    if not seen:
        raise ValueError("the data holds no token to predict")
    tensors = {
        "second_moment": second / seen,
        "mean": mean / seen,
        "token_counts": counts,
        "mean_prob": (mean_prob / seen).float(),
        "curvature": (curvature / seen).float(),
        "prob_weighted_mean": weighted / mean_prob.float().unsqueeze(-1).clamp(min=1e-30),
    }
    kept, labels = sample.result()
    source = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return HeadStats(
        **{name: tensor.cpu() for name, tensor in tensors.items()},
        states=kept,
        labels=labels,
        tokens=seen,
        provenance={"model": source},
    )


class _Reservoir:
    """A uniform sample of a stream: every item draws a random key, the smallest keys stay."""

    def __init__(self, size: int, seed: int):
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)
        self.keys, self.items, self.labels = (
            torch.empty(0),
            torch.empty(0),
            torch.empty(0, dtype=torch.long),
        )

    def add(self, items: Tensor, labels: Tensor) -> None:
        keys = torch.rand(len(items), generator=self.generator)
        keys = torch.cat([self.keys, keys])
        items = torch.cat([self.items.reshape(-1, items.shape[-1]), items])
        labels = torch.cat([self.labels, labels])
        if len(keys) > self.size:
            chosen = keys.topk(self.size, largest=False, sorted=False).indices.sort().values
            keys, items, labels = keys[chosen], items[chosen], labels[chosen]
        self.keys, self.items, self.labels = keys, items, labels

    def result(self) -> tuple[Tensor, Tensor]:
        """In random order, so that a prefix is a sample too."""
        order = self.keys.argsort()
        return self.items[order], self.labels[order]
