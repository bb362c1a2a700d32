"""`diagnose`: attention sinks, entropy, sparsity and massive activations, per layer and head; and the LM head.

Weights are looked at in the blocks of queries in which they are computed; no `(T, T)` map is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_softheads import bridge
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Block, Inputs
from hf_softheads.measure.head_diagnostics import HeadDiagnostics, diagnose_head
from hf_softheads.report.tables import Table

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_NEAR_ZERO = 1e-5


@dataclass(frozen=True)
class Diagnostics:
    """What a model's attention and hidden states look like on a batch; prints as a table, `to_json` dumps it.

    Lists are per layer, or per layer and head.

    Attributes:
        tokens: tokens that were read, without padding.
        epsilon: the threshold of both sink rates.
        renormalised: rows were divided by their sum before `first_key`, `sink_rate` and `sink_rate_of_key`.
        variants: each layer's map.
        first_key: `α_0`, the mean weight of the first key among the rows that see it.
        sink_rate: share of (sample, layer, head) with `α_0 > ε`, percent (arXiv:2410.10781).
        sink_rate_of_key: the same for every key of the window, percent.
        first_column_rate: share of (sample, layer, head) whose mean weight of the first key over all rows, as it is,
            exceeds ε, percent (arXiv:2504.20966).
        entropy: mean entropy of the renormalised rows, nats.
        relative_entropy: entropy over `log n` of rows that see n > 1 keys.
        zeros: share of visible keys whose weight is exactly 0.
        near_zeros: share of visible keys with `|weight| ≤ 1e-5`.
        row_sum: mean sum of a row.
        largest: the three largest magnitudes of the hidden states after each layer, the embedding's first.
        median: the median magnitude of the same.
        kurtosis: `E (h - μ)⁴ / σ⁴` of the same.
        head: what the LM head does; None for a model without one, and one that changes its logits after its head in
            a way that is not understood.
    """

    tokens: int
    epsilon: float
    renormalised: bool
    variants: list[str]
    first_key: list[list[float]]
    sink_rate: float
    sink_rate_of_key: list[float]
    first_column_rate: float
    entropy: list[list[float]]
    relative_entropy: list[list[float]]
    zeros: list[list[float]]
    near_zeros: list[list[float]]
    row_sum: list[list[float]]
    largest: list[list[float]]
    median: list[float]
    kurtosis: list[float]
    head: HeadDiagnostics | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        columns = "layer variant sinks α₀ entropy ÷log(n) zeros row-sum max|h| ÷median kurtosis"
        table = Table(columns.split())
        for i, name in enumerate(self.variants):
            heads = self.first_key[i]
            table.add(
                i,
                name,
                f"{sum(a > self.epsilon for a in heads)}/{len(heads)}",
                f"{_mean(heads):.3f}",
                f"{_mean(self.entropy[i]):.2f}",
                f"{_mean(self.relative_entropy[i]):.3f}",
                f"{_mean(self.zeros[i]):.1%}",
                f"{_mean(self.row_sum[i]):.3f}",
                f"{self.largest[i + 1][0]:.3g}",
                f"{self.largest[i + 1][0] / max(self.median[i + 1], 1e-30):.3g}",
                f"{self.kurtosis[i + 1]:.3g}",
            )
        rows = "renormalised rows" if self.renormalised else "rows as they are"
        head = "" if self.head is None else f"\n\n{self.head}"
        return (
            f"{table}\n  sink rate {self.sink_rate:.1f} % (first key, ε = {self.epsilon}, {rows}), "
            f"{self.first_column_rate:.1f} % (first column over all rows); {self.tokens:,} tokens{head}"
        )

    def plot(self, folder: str | Path) -> list[Path]:
        """Heat maps over layers and heads, the hidden states by layer, and the head, as PNG files."""
        from hf_softheads.report.plots import plot_head, plot_heads, plot_layers

        maps = {
            "weight of the first key": self.first_key,
            "entropy ÷ log n": self.relative_entropy,
            "exact zeros": self.zeros,
        }
        lines = {
            "largest |h|": [values[0] for values in self.largest],
            "median |h|": self.median,
            "kurtosis": self.kurtosis,
        }
        title = f"{', '.join(dict.fromkeys(self.variants))}: sink rate {self.sink_rate:.1f} %"
        files = [
            plot_heads(maps, Path(folder) / "attention.png", title),
            plot_layers(lines, Path(folder) / "hidden_states.png", "hidden states by layer"),
        ]
        if self.head is not None:
            files.append(plot_head(asdict(self.head), Path(folder) / "head.png"))
        return files


@torch.no_grad()
def diagnose(
    model: nn.Module,
    batch: Tensor | Mapping[str, Any],
    *,
    epsilon: float = 0.3,
    renormalise: bool = True,
    stats: HeadStats | None = None,
) -> Diagnostics:
    """Look at every attention map and hidden state of a model, and at its head, on one batch, patched or not.

    Args:
        model: a transformers model.
        batch: token ids `(B, T)`, or the keyword arguments of its forward.
        epsilon: threshold of the sink rates.
        renormalise: divide rows by their sum first, without which maps that do not sum to 1 (sigmoid, softpick) show
            fewer sinks by their scale alone.
        stats: whose token counts rank the tokens in `head.bands`; by default the batch's own.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: the model computes its attention itself, a batch without tokens or with others than the model's, or
            fewer than 2 tokens a row.
    """
    base: Any = bridge.transformers_model(model)
    given = _inputs(batch)
    if "input_ids" in given:
        bridge.check_tokens(base, given["input_ids"])
    shape = given.get("input_ids", given.get("inputs_embeds")).shape[:2]  # type: ignore[union-attr]
    if len(shape) < 2 or shape[1] < 2:
        raise ValueError(f"attention needs rows (B, T) of at least 2 tokens, got {tuple(shape)}")
    layers = bridge.attention_layers(base)
    tallies = {index: Tally(renormalise) for index in layers}
    training = base.training
    seen: list[Tensor] = []
    head = bridge.active_head(base) if base.get_output_embeddings() is not None else None
    handle = head and head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        base.eval()
        with bridge.observed(base, {index: tally.observe for index, tally in tallies.items()}):
            given = {k: v.to(base.device) if isinstance(v, Tensor) else v for k, v in given.items()}
            output = base(**given, use_cache=False, output_hidden_states=True)
    finally:
        base.train(training)
        if handle:
            handle.remove()
    maps = [tally.result() for tally in tallies.values()]
    mask = given.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones(shape).bool()
    states = [hidden_state_facts(h[real.to(h.device)]) for h in output.hidden_states]
    about_head = None
    if seen and "input_ids" in given and _understood(base):
        next_is_real = real[:, :-1] & real[:, 1:]
        labels = given["input_ids"][:, 1:][next_is_real]
        counts = None if stats is None else stats.token_counts
        about_head = diagnose_head(base, seen[0][:, :-1][next_is_real], labels, counts)
    alpha = torch.stack([m.alpha for m in maps], 1)  # (B, L, H, K)
    first = torch.stack([m.first_column for m in maps], 1)
    return Diagnostics(
        tokens=int(real.sum()),
        epsilon=epsilon,
        renormalised=renormalise,
        variants=[_name(module) for _, module in layers.values()],
        first_key=alpha[..., 0].mean(0).tolist(),
        sink_rate=float(sink_rate(alpha, epsilon)[0]),
        sink_rate_of_key=sink_rate(alpha, epsilon).tolist(),
        first_column_rate=100 * float((first > epsilon).double().mean()),
        entropy=[m.entropy.tolist() for m in maps],
        relative_entropy=[m.relative_entropy.tolist() for m in maps],
        zeros=[m.zeros.tolist() for m in maps],
        near_zeros=[m.near_zeros.tolist() for m in maps],
        row_sum=[m.row_sum.tolist() for m in maps],
        largest=[s[0] for s in states],
        median=[s[1] for s in states],
        kurtosis=[s[2] for s in states],
        head=about_head,
    )


def _inputs(batch: Any) -> dict[str, Any]:
    """The keyword arguments of a model's forward that a batch stands for, without labels."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}
    given = dict(batch) if isinstance(batch, Mapping) else {}
    if not any(isinstance(given.get(name), Tensor) for name in ("input_ids", "inputs_embeds")):
        seen = f"the keys {list(given)}" if given else type(batch).__name__
        raise ValueError(
            f"diagnose reads a tensor of token ids (B, T), or a dictionary with input_ids; got {seen}"
        )
    given.pop("labels", None)
    return given


@dataclass(frozen=True)
class HeadFacts:
    """One layer: `alpha (B, H, K)`, `first_column (B, H)`, the others `(H,)`; float64. Key 0 is the first real key."""

    alpha: Tensor
    first_column: Tensor
    entropy: Tensor
    relative_entropy: Tensor
    zeros: Tensor
    near_zeros: Tensor
    row_sum: Tensor


class Tally:
    """Sums over the blocks of one layer's attention map."""

    def __init__(self, renormalise: bool = True):
        self.renormalise = renormalise
        self._sums: dict[str, Tensor] = {}

    def observe(self, inputs: Inputs, block: Block, weights: Tensor, keep: Tensor) -> None:
        """Add one block: `weights (B, H, Q, K)` of the keys `block.columns`, `keep` bool, broadcastable to them."""
        batch, heads = inputs.query.shape[:2]
        if not self._sums:
            whole = weights.new_zeros(batch, heads, inputs.key.shape[2], dtype=torch.float64)
            self._sums = {name: whole.clone() for name in ("column", "raw", "seen")}
            self._sums["facts"] = whole.new_zeros(batch, heads, 8)
        weights = weights.double()
        keep = keep.expand_as(weights)
        total = weights.abs().sum(-1, keepdim=True)
        shares = weights.abs() / total.masked_fill(total == 0, 1)  # |w|: linear maps go below 0
        here = (block.batch, slice(None), block.columns)
        self._sums["column"][here] += (shares if self.renormalise else weights).sum(2)
        self._sums["raw"][here] += weights.sum(2)
        self._sums["seen"][here] += keep.sum(2)
        seen = keep.sum(-1)
        entropy = torch.special.entr(shares).sum(-1)
        facts = (
            seen > 0,
            seen > 1,
            seen,
            entropy,
            torch.where(seen > 1, entropy / seen.clamp(min=2).log(), 0),
            ((weights == 0) & keep).sum(-1),
            ((weights.abs() <= _NEAR_ZERO) & keep).sum(-1),
            weights.sum(-1),
        )
        self._sums["facts"][block.batch] += torch.stack([f.double().sum(2) for f in facts], -1)

    def result(self) -> HeadFacts:
        sums = self._sums
        seen = sums["seen"]
        start = (seen > 0).double().argmax(-1, keepdim=True)  # left padding
        shift = (torch.arange(seen.shape[-1], device=seen.device) + start) % seen.shape[-1]
        alpha = (sums["column"] / seen.clamp(min=1)).gather(-1, shift)
        rows, long, entries, entropy, relative, zeros, near, total = sums["facts"].sum(0).unbind(-1)
        live = sums["facts"][..., 0]
        return HeadFacts(
            alpha=alpha,
            first_column=sums["raw"].gather(-1, start).squeeze(-1) / live.clamp(min=1),
            entropy=entropy / rows.clamp(min=1),
            relative_entropy=relative / long.clamp(min=1),
            zeros=zeros / entries.clamp(min=1),
            near_zeros=near / entries.clamp(min=1),
            row_sum=total / rows.clamp(min=1),
        )


def sink_rate(alpha: Tensor, epsilon: float = 0.3) -> Tensor:
    """Percent of samples, layers and heads with `α_k > ε`, for every key k; alpha `(…, K)` to `(K,)`."""
    return 100 * (alpha > epsilon).double().flatten(0, -2).mean(0)


def hidden_state_facts(states: Tensor) -> tuple[list[float], float, float]:
    """Three largest magnitudes, median magnitude and kurtosis of all entries of `states`."""
    values = states.double().flatten()
    magnitude = values.abs()
    centred = values - values.mean()
    variance = centred.square().mean()
    kurtosis = (centred**4).mean() / variance.square().clamp(min=1e-300)
    return magnitude.topk(3).values.tolist(), float(magnitude.median()), float(kurtosis)


def _understood(model: Any) -> bool:
    """Whether the model's logits follow from its hidden states."""
    try:
        bridge.SplitModel(model)
    except ValueError:
        return False
    return True


def _name(module: nn.Module) -> str:
    spec = getattr(getattr(module, bridge.CHILD, None), "spec", None)  # also inside PEFT's wrapper
    if isinstance(spec, AttentionSpec):
        return spec.name
    return "softmax" if getattr(module, "sinks", None) is None else "learned_sink"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
