"""Which of a call's logits processors can work on the best tokens, and how far they must wait for all logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_softheads import bridge
from hf_softheads.decoding.steps import (
    ByValue,
    Epsilon,
    Lowering,
    MinP,
    Scale,
    Step,
    TopK,
    TopP,
)


@dataclass
class Chain:
    """Processors as steps on candidates.

    Attributes:
        whole: how many processors come before and need all logits.
        temperature: what the candidates' logits are divided by before the first step.
        total: whether a step needs the normaliser of all tokens.
        open: whether tokens other than the candidates may be left at the end.
        steps: see `Step`.
    """

    whole: int
    temperature: float = 1.0
    total: bool = False
    open: bool = True
    steps: list[Step] = field(default_factory=list)


def chain_of(processors: Sequence[Any], vocab: int, sample: bool) -> Chain:
    """The chain that needs all logits for as few of the first processors as possible."""
    found = (_chain(processors, start, vocab, sample) for start in range(len(processors)))
    return next((chain for chain in found if chain is not None), Chain(len(processors)))


def _chain(processors: Sequence[Any], whole: int, vocab: int, sample: bool) -> Chain | None:
    """The chain after the first `whole` processors; None where one of the others needs all logits."""
    chain = Chain(whole)
    for processor in processors[whole:]:
        name = bridge.by_value(processor)
        declared = getattr(processor, "on_candidates", None)
        least = getattr(processor, "min_tokens_to_keep", 1)
        untouched = not chain.steps
        if name == "LogitNormalization":
            continue  # the same for all tokens of a row
        if name == "TemperatureLogitsWarper" and untouched:
            chain.temperature *= processor.temperature
        elif name == "TemperatureLogitsWarper":
            chain.steps.append(Scale(processor.temperature))
        elif bridge.lowers(processor) or declared == "lowers":
            chain.steps.append(Lowering(processor, vocab))
        elif not chain.open and (name or declared == "by value"):
            chain.steps.append(ByValue(processor))
        elif name == "TopKLogitsWarper":
            chain.steps.append(TopK(processor.top_k))
            chain.open = False
        elif name == "MinPLogitsWarper":
            chain.steps.append(MinP(processor.min_p, least))
            chain.open = False
        elif untouched and name == "TopPLogitsWarper":
            chain.steps.append(TopP(processor.top_p, least))
            chain.open, chain.total = False, True
        elif untouched and name == "EpsilonLogitsWarper":
            chain.steps.append(Epsilon(processor.epsilon, least))
            chain.open, chain.total = False, True
        elif callable(declared) and (untouched or not processor.needs_total or not chain.open):
            chain.steps.append(declared)
            chain.total |= processor.needs_total and chain.open
            chain.open = False
        else:
            return None
    return None if sample and chain.open and chain.steps else chain
