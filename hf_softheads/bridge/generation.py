"""What the inside of `generate` must do where a head is asked for a token instead of all logits."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_softheads.bridge.heads import active_head
from hf_softheads.heads.base import Head

Question = Callable[[Head, Tensor], Any]

# Processors of transformers that lower scores, each by itself, or leave them.
_LOWERING = (
    "EncoderNoRepeatNGramLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
)
# Those that see the scores and not whose they are.
_BY_VALUE = (
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
    "MinPLogitsWarper",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)


def lowers(processor: Any) -> bool:
    """Whether one of transformers' processors only ever lowers scores, each whatever the others are."""
    name = _own_name(processor)
    if name == "RepetitionPenaltyLogitsProcessor":
        return bool(processor.penalty >= 1)
    return name in _LOWERING


def by_value(processor: Any) -> str | None:
    """Name of one of transformers' processors that sees scores and not whose they are; None of any other."""
    name = _own_name(processor)
    drops = getattr(processor, "filter_value", -torch.inf) == -torch.inf
    return name if name in _BY_VALUE and drops else None


def _own_name(processor: Any) -> str | None:
    cls = type(processor)
    return cls.__name__ if cls.__module__.startswith("transformers.generation.") else None


class AskedHead:
    """A model's head while `generate` runs: in the model's forward it only keeps what it is given.

    Called with a question, it answers for the last hidden state of each row, `(B, D)`, as the model's own call of the
    head would: through what has been wrapped around it.
    """

    def __init__(self, model: Any):
        self._module: Any = model.get_output_embeddings()
        self.head: Head = active_head(model)
        self._keeping = self._keep  # one object, which compiled code may compare
        self._hidden: Tensor | None = None

    def _keep(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden[:, -1]
        return hidden[..., :1]  # cheap, and enough for what a family does to its logits

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the context the model computes no scores."""
        self.head.question = self._keeping
        try:
            yield
        finally:
            self.head.question = None

    def __call__(self, question: Question) -> Any:
        self.head.question = lambda hidden: question(self.head, hidden)
        try:
            return self._module(self._hidden)
        finally:
            self.head.question = self._keeping


class _Chosen:
    """Stands for scores of which only the largest is known: `torch.argmax` gives it."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.argmax:
            return args[0].tokens
        raise NotImplementedError(f"{func} of tokens that are chosen already")


def decode(
    model: Any,
    input_ids: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
    config: Any,
    **rest: Any,
) -> Any:
    """transformers' own loop of greedy search, with `choose(input_ids, logits) -> tokens (B,)` for its argmax."""
    config = copy.copy(config)
    config.do_sample = config.output_scores = config.output_logits = False

    def processors(ids: Tensor, logits: Tensor) -> _Chosen:
        return _Chosen(choose(ids, logits).to(ids.device))

    return model._sample(input_ids, logits_processor=processors, generation_config=config, **rest)


def decode_whole(model: Any, input_ids: Tensor, processors: Any, config: Any, **rest: Any) -> Any:
    """transformers' own loops, on all logits."""
    loop = model._beam_search if config.num_beams > 1 else model._sample
    return loop(input_ids, logits_processor=processors, generation_config=config, **rest)


def check_mode(config: Any, assistant: Any) -> None:
    """Raise ValueError for what transformers decodes by other loops."""
    mode = config.get_generation_mode(assistant).value
    if mode not in ("greedy_search", "sample", "beam_search", "beam_sample"):
        raise ValueError(
            f"decoding.candidates decodes greedily, by sampling and by beams, and was asked for {mode}; leave "
            "custom_generate out for that"
        )


def with_forgotten(extract: Any, custom: Any, kwargs: dict[str, Any], *args: Any) -> dict[str, Any]:
    """What `generate` hands to its loop. transformers gives a function `custom` less than its own loops: also what of
    theirs it takes, such as a streamer."""
    usual = extract(None, dict(kwargs), *args) if callable(custom) else {}
    taken = inspect.signature(custom).parameters if callable(custom) else ()
    own: dict[str, Any] = extract(custom, kwargs, *args)
    return {**{name: value for name, value in usual.items() if name in taken}, **own}
