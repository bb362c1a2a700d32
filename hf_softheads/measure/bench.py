"""`bench`: how fast a whole model reads a prompt and writes tokens with each of several heads."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_softheads import bridge
from hf_softheads.embeddings.head_rows import RowsEmbedding, RowsTwin
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import progress
from hf_softheads.heads.stats import HeadStats
from hf_softheads.measure.memory import can_measure_memory, peak_memory
from hf_softheads.measure.step_times import Parts, Sample, sample, with_parts
from hf_softheads.patching import patch, unpatch
from hf_softheads.plan import plan_of
from hf_softheads.report.provenance import provenance
from hf_softheads.report.tables import Table, human_bytes

DENSE = "dense"
_LEAST = 3  # rounds, whatever they take


@dataclass(frozen=True)
class Row:
    """One head at one batch size; times are medians over rounds.

    Attributes:
        prefill: prompt tokens read a second, the head run on each prompt's last token.
        decode: tokens written a second.
        body_ms, head_ms: of a decoding step, without and within the head.
        speedup: of a decoding step over the dense head's in the same round.
        limit: the speedup of a head that takes no time at all, by Amdahl's law.
        bytes_read: bytes of weights that a decoding step reads, the cache not counted.
        peak: bytes of the model's weights and what the first prompt and its first tokens took beside them; None where
            the system does not say.
        backend: what computes the head.
    """

    head: str
    batch: int
    prefill: float
    decode: float
    body_ms: float
    head_ms: float
    speedup: float
    limit: float
    bytes_read: int
    peak: int | None
    backend: str


@dataclass(frozen=True)
class Bench:
    """What `bench` measured; prints as a table, `to_json` dumps it with the settings and the machine."""

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=provenance)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        names = ["head", "batch", "prefill tok/s", "decode tok/s", "body ms", "head ms"]
        table = Table([*names, "÷ dense", "limit", "read a step", "peak memory"])
        for row in self.rows:
            table.add(
                row.head,
                row.batch,
                f"{row.prefill:.1f}",
                f"{row.decode:.2f}",
                f"{row.body_ms:.2f}",
                f"{row.head_ms:.2f}",
                f"{row.speedup:.3f}×",
                f"{row.limit:.3f}×",
                human_bytes(row.bytes_read),
                "–" if row.peak is None else human_bytes(row.peak),
            )
        computed = {row.head: row.backend for row in self.rows}
        return "\n".join([str(table), *(f"  {name}: {how}" for name, how in computed.items())])


@torch.no_grad()
def bench(
    model: nn.Module,
    heads: Mapping[str, HeadSpec] | None = None,
    *,
    stats: HeadStats | None = None,
    batches: Sequence[int] = (1, 4, 16),
    prompt: int = 128,
    steps: int = 8,
    seconds: float = 20.0,
    seed: int = 0,
) -> Bench:
    """Time a decoder-only model with its own head and with others, one after the other in every round.

    A round reads a prompt of random tokens and writes `steps` tokens greedily with each head, in shuffled order, so
    that what else the machine does meets all of them alike. Head and body are told apart inside the same step. Each
    head is fitted and put in as `patch` does, with the tied embedding that reads its rows; the model is put back. A
    model that is patched already is compared with a dense head of random numbers, as fast as the trained one.

    Args:
        heads: variants by the names that the table shows.
        stats: what `collect` found, for fits that need it; what is in the codes hardly changes the speed.
        batches: rows decoded together.
        prompt: tokens a row; steps: tokens written after it.
        seconds: per batch size; at least three rounds are run.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: a count below 1, more tokens than the model has positions for, heads for a model that is patched
            already, or a head that cannot be fitted.
    """
    base = bridge.transformers_model(model)
    heads = dict(heads or {})
    _check(base, heads, batches, prompt, steps, seconds)
    training = base.training
    base.eval()
    try:
        variants = _variants(base, heads, stats)
        rows: list[Row] = []
        order = random.Random(seed)
        for batch in batches:
            ids = torch.randint(
                bridge.vocabulary(base),
                (batch, prompt),
                generator=torch.Generator().manual_seed(seed),
            ).to(base.device)
            peaks = {name: _peak(base, parts, ids) for name, parts in variants.items()}
            rounds = _rounds(base, variants, ids, steps, seconds, order)
            rows += _rows(base, variants, rounds, batch, prompt, peaks)
    finally:
        base.train(training)
    settings = {
        "prompt": prompt,
        "steps": steps,
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "heads": {name: spec.to_dict() for name, spec in heads.items()},
    }
    return Bench(tuple(rows), settings, provenance(seed))


def _check(
    base: Any,
    heads: Mapping[str, HeadSpec],
    batches: Sequence[int],
    prompt: int,
    steps: int,
    seconds: float,
) -> None:
    for name, count in {
        "prompt": prompt,
        "steps": steps,
        **{f"batch {b}": b for b in batches},
    }.items():
        if count < 1:
            raise ValueError(f"bench needs at least 1 as {name}, got {count}")
    if not batches:
        raise ValueError("bench needs at least one batch size, got none")
    if not seconds > 0:
        raise ValueError(f"bench needs a positive number of seconds, got {seconds}")
    if base.config.is_encoder_decoder:
        raise ValueError(
            f"bench times decoder-only models; {type(base).__name__} is an encoder-decoder"
        )
    limit = getattr(bridge.text_config(base), "max_position_embeddings", None)
    if limit is not None and prompt + steps > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and {steps} after it are more than this model's {limit} positions"
        )
    if DENSE in heads:
        raise ValueError(f"{DENSE!r} is the name of the model's own head; choose another one")
    plan = plan_of(base)
    if heads and plan is not None and "head" in plan.parts:
        raise ValueError(
            f"this model's head is already patched with {plan.head}; leave the heads out to compare it with a dense "
            "one, or give the original model"
        )


def _variants(
    base: Any, heads: Mapping[str, HeadSpec], stats: HeadStats | None
) -> dict[str, Parts]:
    """The modules of each variant, the dense ones first; the model ends as it was."""
    path, own = bridge.find_head(base)
    if isinstance(own, Head):
        dense = nn.Linear(own.in_features, own.out_features, bias=False, device="meta")
        weight = torch.empty(
            own.out_features, own.in_features, dtype=base.dtype, device=own.weight.device
        )
        dense.weight = nn.Parameter(weight.normal_(std=own.in_features**-0.5), requires_grad=False)
        plan = plan_of(base)
        name = str(plan.head.short()) if plan is not None else type(own).__name__
        return {DENSE: {path: dense}, name: {path: own}}
    variants: dict[str, Parts] = {DENSE: {}}
    touched = {path}
    for name, spec in heads.items():
        patch(base, head=spec, stats=stats, saving=False)
        try:
            parts: Parts = {path: base.get_submodule(path)}
            for place, module in base.named_modules(remove_duplicate=False):
                if isinstance(module, RowsEmbedding | RowsTwin):
                    parts[place] = module
        finally:
            unpatch(base)
        variants[name] = parts
        touched |= parts.keys()
    original = {place: base.get_submodule(place) for place in touched}
    return {name: {**original, **parts} for name, parts in variants.items()}


def _rounds(
    base: Any,
    variants: Mapping[str, Parts],
    ids: Tensor,
    steps: int,
    seconds: float,
    order: random.Random,
) -> list[dict[str, Sample]]:
    found: list[dict[str, Sample]] = []
    began = time.perf_counter()
    names = list(variants)
    while len(found) < _LEAST or time.perf_counter() - began < seconds:
        order.shuffle(names)
        shown = progress(names, f"batch {len(ids)}, round {len(found) + 1}")
        found.append({name: sample(base, variants[name], ids, steps) for name in shown})
    return found


def _rows(
    base: Any,
    variants: Mapping[str, Parts],
    rounds: Sequence[Mapping[str, Sample]],
    batch: int,
    prompt: int,
    peaks: Mapping[str, int | None],
) -> Iterator[Row]:
    def median(name: str, what: Callable[[Sample], float]) -> float:
        return statistics.median(what(taken[name]) for taken in rounds)

    limit = median(DENSE, lambda s: s.decode.whole / s.decode.body)
    for name, parts in variants.items():
        with with_parts(base, parts) as head:
            read = _bytes_read(base, head, batch)
        yield Row(
            head=name,
            batch=batch,
            prefill=batch * prompt / median(name, lambda s: s.prefill.whole),
            decode=batch / median(name, lambda s: s.decode.whole),
            body_ms=1e3 * median(name, lambda s: s.decode.body),
            head_ms=1e3 * median(name, lambda s: s.decode.head),
            speedup=statistics.median(t[DENSE].decode.whole / t[name].decode.whole for t in rounds),
            limit=limit,
            bytes_read=read,
            peak=peaks[name],
            backend=head.backend if isinstance(head, Head) else "torch",
        )


def _tensors(module: nn.Module) -> dict[int, int]:
    """Bytes of each of a module's tensors, those that are shared once."""
    every = [*module.parameters(), *module.buffers()]
    return {t.data_ptr(): t.numel() * t.element_size() for t in every}


def _bytes_read(base: Any, head: nn.Module, batch: int) -> int:
    """Of the head, of the layers and of one row a token of the input embedding."""
    embedding = base.get_input_embeddings()
    apart = {**_tensors(head), **_tensors(embedding)}
    layers = sum(size for place, size in _tensors(base).items() if place not in apart)
    own = head.bytes_read if isinstance(head, Head) else sum(_tensors(head).values())
    rows = batch * embedding.embedding_dim * base.dtype.itemsize
    return int(layers + own + rows)


def _peak(base: Any, parts: Parts, ids: Tensor) -> int | None:
    """Bytes of the weights, and the growth over them while a prompt is read and a token written."""
    with with_parts(base, parts):
        held = sum(_tensors(base).values())
        if base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(base.device)
            before = torch.cuda.memory_allocated(base.device)
            sample(base, parts, ids, 1)
            return held + int(torch.cuda.max_memory_allocated(base.device)) - before
        if not can_measure_memory():
            return None
        with peak_memory() as grown:
            sample(base, parts, ids, 1)
        return held + grown["bytes"]
