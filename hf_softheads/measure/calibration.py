"""`collect`: statistics of a model's last hidden states, in one pass over text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads import bridge
from hf_softheads.heads.base import Head
from hf_softheads.heads.stats import HeadStats, softmax_curvature
from hf_softheads.text.windows import windows

_CHUNK_ELEMENTS = 2**24  # probabilities held at once


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
        data: text, files, a `datasets` object or tokens; see `hf_softheads.text.windows.windows`.
        tokenizer: needed for text.
        states: how many hidden states to keep, sampled uniformly under `seed`.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: a model without a head, an already patched head, empty data, tokens outside the vocabulary.
    """
    reader = bridge.SplitModel(model)
    if isinstance(reader.head, Head):
        raise ValueError(
            "this model's head is patched already; collect statistics from the original model"
        )
    rows = windows(data, tokenizer, window=window)
    bridge.check_tokens(model, rows.input_ids, rows.labels)
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
                curvature += softmax_curvature(p).sum(0, dtype=torch.float64)
    finally:
        model.train(was_training)
    if not seen:
        raise ValueError("the data holds no token to predict")
    weighted /= mean_prob.float().unsqueeze(-1).clamp(min=1e-30)
    tensors = {
        "second_moment": second / seen,
        "mean": mean / seen,
        "token_counts": counts,
        "mean_prob": (mean_prob / seen).float(),
        "curvature": (curvature / seen).float(),
        "prob_weighted_mean": weighted.bfloat16(),
    }
    kept, labels = sample.result()
    source = bridge.source(bridge.transformers_model(model)) or type(model).__name__
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
