"""`compare`: several models over one vocabulary, against the first of them."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hf_softheads import bridge
from hf_softheads.heads.base import Head
from hf_softheads.measure.evaluation import evaluate
from hf_softheads.measure.step_times import Sample, sample
from hf_softheads.report.provenance import provenance
from hf_softheads.report.tables import Table, human_bytes
from hf_softheads.text.windows import Windows


@dataclass(frozen=True)
class Candidate:
    """A model to compare: what the table calls it, what loads it, and its bytes on disk."""

    name: str
    load: Callable[[], Any]
    nbytes: int


@dataclass(frozen=True)
class Compared:
    """One model; numbers against the reference are None for the reference itself.

    Attributes:
        nbytes: of its files on disk; head_nbytes: of its head in memory.
        perplexity: strict; loss_error: standard error of its logarithm over tokens.
        ratio: of the perplexity to the reference's; ratio_error: standard error of that, from the difference token by
            token.
        kl, top1: mean divergence from the reference in nats, and how often the most likely token is its.
        decode: tokens written a second at batch 1; speedup: over the reference, in the same rounds.
    """

    name: str
    nbytes: int
    head_nbytes: int
    perplexity: float
    loss_error: float
    decode: float
    ratio: float | None = None
    ratio_error: float | None = None
    kl: float | None = None
    top1: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, the reference first; prints as a table."""

    rows: tuple[Compared, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=provenance)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> Table:
        names = ["model", "on disk", "head", "perplexity", "÷ first", "KL", "top-1"]
        table = Table([*names, "decode tok/s", "speed"])
        for row in self.rows:
            table.add(
                row.name,
                human_bytes(row.nbytes),
                human_bytes(row.head_nbytes),
                f"{row.perplexity:.3f} ± {row.perplexity * row.loss_error:.3f}",
                "–" if row.ratio is None else f"{row.ratio:.4f} ± {row.ratio_error:.4f}",
                "–" if row.kl is None else f"{row.kl:.5f}",
                "–" if row.top1 is None else f"{row.top1:.2%}",
                f"{row.decode:.2f}",
                "–" if row.speedup is None else f"{row.speedup:.3f}×",
            )
        return table

    def __str__(self) -> str:
        return str(self.table())


def compare(
    candidates: Sequence[Candidate],
    data: Windows,
    *,
    prompt: int = 64,
    steps: int = 8,
    rounds: int = 5,
    seed: int = 0,
) -> Comparison:
    """Quality, sizes and speed of models against the first of them, which stays in memory beside each of the others.

    Args:
        data: held-out token windows, the same for all.
        prompt, steps, rounds: a round reads a prompt of random tokens with both models, in either order, and writes
            `steps` tokens with each; speeds are medians over rounds.

    Raises:
        ValueError: fewer than two candidates, two of one name, or another vocabulary.
    """
    names = [candidate.name for candidate in candidates]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"compare needs two or more models of different names, got {names}")
    reference = candidates[0].load()
    reference.eval()
    ids = torch.randint(
        bridge.vocabulary(reference), (1, prompt), generator=torch.Generator().manual_seed(seed)
    ).to(reference.device)
    quality = evaluate(reference, data)
    speeds: list[float] = []
    rows = []
    for candidate in candidates[1:]:
        model = candidate.load()
        model.eval()
        found = evaluate(model, data, reference=reference)
        taken = _rounds([reference, model], ids, steps, rounds, random.Random(seed))
        speeds += [1 / first.decode.whole for first, _ in taken]
        rows.append(
            Compared(
                name=candidate.name,
                nbytes=candidate.nbytes,
                head_nbytes=_head_bytes(model),
                perplexity=found.perplexity,
                loss_error=found.standard_error,
                decode=statistics.median(1 / own.decode.whole for _, own in taken),
                ratio=found.ratio,
                ratio_error=found.ratio_error,
                kl=found.kl,
                top1=found.top1,
                speedup=statistics.median(a.decode.whole / b.decode.whole for a, b in taken),
            )
        )
        del model
    first = Compared(
        name=candidates[0].name,
        nbytes=candidates[0].nbytes,
        head_nbytes=_head_bytes(reference),
        perplexity=quality.perplexity,
        loss_error=quality.standard_error,
        decode=statistics.median(speeds),
    )
    settings = {
        "tokens": quality.tokens,
        "window": data.input_ids.shape[1],
        "prompt": prompt,
        "steps": steps,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    return Comparison((first, *rows), settings, provenance(seed))


@torch.no_grad()
def _rounds(
    models: Sequence[Any], ids: torch.Tensor, steps: int, rounds: int, order: random.Random
) -> list[tuple[Sample, Sample]]:
    found = []
    for _ in range(rounds):
        places = [0, 1]
        order.shuffle(places)
        taken = {i: sample(models[i], {}, ids.to(models[i].device), steps) for i in places}
        found.append((taken[0], taken[1]))
    return found


def _head_bytes(model: Any) -> int:
    head = bridge.output_head(model)
    if isinstance(head, Head):
        return head.nbytes
    return sum(t.numel() * t.element_size() for t in head.state_dict(keep_vars=True).values())
