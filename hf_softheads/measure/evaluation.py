"""`evaluate`: what a patch cost, on text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads import bridge
from hf_softheads.losses.base import kl_divergence
from hf_softheads.report.tables import Table
from hf_softheads.text.windows import windows

_CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True)
class Evaluation:
    """Quality of a causal model on held-out tokens; prints as a table, `to_json` dumps it.

    Attributes:
        tokens: tokens predicted.
        loss: mean `-log p(token)` over the whole vocabulary, nats.
        standard_error: of `loss`, over tokens.
        perplexity: `exp(loss)`: strict, nothing is masked out.
        bits_per_byte: `loss` in bits over the text's bytes; None when the data was tokens.
        kl: mean `KL(reference ‖ model)` a token, nats.
        top1: share of tokens whose most likely token is the reference's.
        top5: mean overlap of the five most likely tokens with the reference's, over five.
        reference_perplexity: the reference on the same tokens.
        ratio: of the perplexity to the reference's; ratio_error: its standard error, from the difference of the two
            losses token by token.
    """

    tokens: int
    loss: float
    standard_error: float
    perplexity: float
    bits_per_byte: float | None = None
    kl: float | None = None
    top1: float | None = None
    top5: float | None = None
    reference_perplexity: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        table = Table(["", "value"])
        table.add("tokens", f"{self.tokens:,}")
        table.add("perplexity", f"{self.perplexity:.3f}")
        table.add("loss (nats)", f"{self.loss:.4f} ± {self.standard_error:.4f}")
        if self.bits_per_byte is not None:
            table.add("bits per byte", f"{self.bits_per_byte:.4f}")
        if self.reference_perplexity is not None:
            table.add("reference perplexity", f"{self.reference_perplexity:.3f}")
            table.add("perplexity ratio", f"{self.ratio:.4f} ± {self.ratio_error:.4f}")
            table.add("KL(reference ‖ model)", f"{self.kl:.5f}")
            table.add("top-1 agreement", f"{self.top1:.2%}")
            table.add("top-5 overlap", f"{self.top5:.2%}")
        return str(table)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    reference: nn.Module | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Strict perplexity, and agreement with a reference, by a sliding window.

    Args:
        model: a causal model, patched or not.
        data: text, files, a `datasets` object or tokens; see `hf_softheads.text.windows.windows`.
        tokenizer: needed for text.
        reference: a model over the same vocabulary, or a head on the same hidden states (`dense_head(model)`).
        window: tokens a window; default what the model was trained for, at most 1,024.
        stride: how far the window moves; default `window`.

    Raises:
        TypeError: `model` is not a transformers model, or `reference` neither one nor a head.
        ValueError: empty or too short data, tokens outside the vocabulary, a reference with another one.
    """
    reader = bridge.SplitModel(model)
    if window is None:
        config = bridge.text_config(model)
        window = min(getattr(config, "max_position_embeddings", None) or 1024, 1024)
    rows = windows(data, tokenizer, window=window, stride=stride)
    bridge.check_tokens(model, rows.input_ids, rows.labels)
    teacher = None if reference is None else _Teacher(reference, reader)
    device = reader.head.weight.device
    sums = _Sums()
    modes = [(m, m.training) for m in (model, reference) if m is not None]
    for module, _ in modes:
        module.eval()
    try:
        total = -(-len(rows.input_ids) // batch_size)
        for batch in tqdm(rows.batches(batch_size), total=total, desc="evaluate", disable=None):
            labels = batch.pop("labels")[:, 1:]
            keep = labels != -100
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            hidden = reader.hidden(**batch)[:, :-1][keep.to(device)]
            other = None if teacher is None else teacher.hidden(batch, hidden, keep)
            labels = labels[keep].to(device)
            chunk = max(1, _CHUNK_ELEMENTS // reader.vocab)
            for start in range(0, len(labels), chunk):
                part = slice(start, start + chunk)
                logits = reader.logits(hidden[part])
                wanted = None if teacher is None or other is None else teacher.logits(other[part])
                sums.add(logits, labels[part], wanted)
    finally:
        for module, mode in modes:
            module.train(mode)
    return sums.result(rows.n_bytes)


class _Teacher:
    """The reference, as a model of its own or as a head on the evaluated model's hidden states."""

    def __init__(self, reference: nn.Module, reader: bridge.SplitModel):
        head_alone = isinstance(reference, nn.Module) and not hasattr(
            reference, "get_output_embeddings"
        )
        self.own = None if head_alone else bridge.SplitModel(reference)
        self.reader, self.reference = reader, reference
        head = self.own.head if self.own else reference
        vocab = getattr(head, "out_features", reader.vocab)
        if vocab != reader.vocab:
            raise ValueError(
                f"the reference has {vocab} tokens, the model {reader.vocab}; they cannot be compared"
            )

    def hidden(self, batch: dict[str, Tensor], hidden: Tensor, keep: Tensor) -> Tensor:
        if self.own is None:
            return hidden
        device = self.own.head.weight.device
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        return self.own.hidden(**inputs)[:, :-1][keep.to(device)]

    def logits(self, hidden: Tensor) -> Tensor:
        if self.own is not None:
            return self.own.logits(hidden)
        return self.reader.transform(self.reference(hidden).float())


class _Sums:
    """Running totals in fp64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.loss = self.squared = self.kl = self.top1 = self.top5 = self.reference = 0.0
        self.difference = self.difference_squared = 0.0
        self.compared = False

    def add(self, logits: Tensor, labels: Tensor, wanted: Tensor | None) -> None:
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()
        self.tokens += len(labels)
        self.loss += float(nll.sum())
        self.squared += float(nll.square().sum())
        if wanted is None:
            return
        self.compared = True
        log_q = wanted.to(log_p.device).log_softmax(-1)
        wanted_nll = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()
        difference = nll - wanted_nll
        self.reference += float(wanted_nll.sum())
        self.difference += float(difference.sum())
        self.difference_squared += float(difference.square().sum())
        self.kl += float(kl_divergence(log_q, log_p).double().sum())
        k = min(5, logits.shape[-1])
        mine, theirs = logits.topk(k).indices, wanted.topk(k).indices.to(logits.device)
        self.top1 += float((mine[:, 0] == theirs[:, 0]).double().sum())
        self.top5 += float(
            (mine.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).double().mean(-1).sum()
        )

    def result(self, n_bytes: int | None) -> Evaluation:
        if not self.tokens:
            raise ValueError("the data holds no token to predict")
        n = self.tokens
        loss = self.loss / n
        variance = max(self.squared / n - loss**2, 0.0)
        compared: dict[str, float] = {}
        if self.compared:
            compared = {
                "kl": self.kl / n,
                "top1": self.top1 / n,
                "top5": self.top5 / n,
                "reference_perplexity": math.exp(self.reference / n),
                **self._ratio(),
            }
        return Evaluation(
            tokens=n,
            loss=loss,
            standard_error=math.sqrt(variance / n),
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=None if n_bytes is None else self.loss / math.log(2) / n_bytes,
            **compared,
        )

    def _ratio(self) -> dict[str, float]:
        """The ratio of perplexities and its standard error."""
        mean = self.difference / self.tokens
        if mean >= 700:
            return {"ratio": math.inf, "ratio_error": math.inf}
        variance = max(self.difference_squared / self.tokens - mean**2, 0.0)
        ratio = math.exp(mean)
        return {"ratio": ratio, "ratio_error": ratio * math.sqrt(variance / self.tokens)}
