"""`generate` from the best tokens of a head instead of all its logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hf_softheads import bridge
from hf_softheads.decoding.chain import Chain, chain_of
from hf_softheads.decoding.steps import Candidates
from hf_softheads.heads.base import Head, LogitTransform
from hf_softheads.heads.forms.sampling import gumbel_max

_FEW = 16  # candidates to begin with
_GROWTH = 4

Ask = Callable[[bridge.Question], Any]


def candidates(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    assistant_model: Any = None,
    tokenizer: Any = None,
    top_logprobs: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """`model.generate(…, custom_generate=sh.decoding.candidates)`: the same tokens, from the head's best ones.

    Greedy search gives the tokens of plain `generate`, sampling draws from the same distribution (by the Gumbel-max
    trick, so not the same draws of one seed). The head is asked for as many tokens as the call's logits processors need
    to be sure (`Head.topk`, `topk_logsumexp`), and for a draw where none of them cuts (`Head.sample`): nothing sorts,
    copies or normalises a row of the vocabulary. Temperature, top-k, top-p, min-p, epsilon, penalties and bans work on
    candidates; typical, eta and top-h after one that cuts. Any other processor gets all logits, with a warning, and so
    do beams, `output_scores`, `output_logits` and heads under a hook or an unknown transform of their family.

    A processor of your own says by its attribute `on_candidates` that it works on candidates: `"lowers"`, if it lowers
    scores or leaves them, each whatever the others are; `"by value"`, if it does not look at whose they are (then it is
    run once a processor before it has cut); or a method `(input_ids, Candidates) -> Candidates | None` that cuts, with
    an attribute `needs_total`, see `decoding.Candidates`.

    Args:
        top_logprobs: with `return_dict_in_generate=True`, the output gets `log_probs (B, T)` of the new tokens under
            the model itself, before any processor, and `top_tokens` and `top_log_probs (B, T, n)` of its n best; 0
            after a row's end. `top_logprobs=0` asks for `log_probs` alone.

    Raises:
        ValueError: the model has no head of this package, or is asked for what other loops decode.
    """
    head = bridge.active_head(model)
    config = generation_config
    _check(head, config, assistant_model, top_logprobs)
    rest = {
        "stopping_criteria": stopping_criteria,
        "synced_gpus": synced_gpus,
        **({} if streamer is None else {"streamer": streamer}),
        **model_kwargs,
    }
    prompt = input_ids.shape[-1]
    whole = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    if whole or config.num_beams > 1:
        if config.num_beams > 1:
            rest.pop("streamer", None)
        return _whole(model, input_ids, logits_processor, config, top_logprobs, rest)
    chain = chain_of(logits_processor, head.out_features, config.do_sample)
    asked = None
    if reason := _needs_all(head, logits_processor, chain):
        warnings.warn(f"candidate decoding computes all logits here: {reason}", stacklevel=4)
    else:
        asked = bridge.AskedHead(model)
    chooser = _Chooser(logits_processor, chain, head, asked, config.do_sample, top_logprobs)
    if asked is None:
        result = bridge.decode(model, input_ids, chooser, config, **rest)
    else:
        with asked.keeping():
            result = bridge.decode(model, input_ids, chooser, config, **rest)
    if top_logprobs is not None:
        alive = _alive(result.sequences[:, prompt:], config)
        for name, values in chooser.recorded().items():
            result[name] = values.masked_fill(
                ~alive.view(*alive.shape, *[1] * (values.ndim - 2)), 0
            )
    return result


def _check(head: Any, config: Any, assistant: Any, top_logprobs: int | None) -> None:
    if not isinstance(head, Head):
        raise ValueError(
            f"decoding.candidates asks a head of hf_softheads for its best tokens, and this model's head is a "
            f"{type(head).__name__}; sh.patch(model, head=…) first, sh.heads.Dense() keeps its logits"
        )
    bridge.check_mode(config, assistant)
    if top_logprobs is None:
        return
    if not config.return_dict_in_generate:
        raise ValueError("top_logprobs are part of the output; pass return_dict_in_generate=True")
    if config.num_beams > 1:
        raise ValueError("top_logprobs are those of one sequence a prompt; leave num_beams out")
    if not 0 <= top_logprobs <= head.out_features:
        raise ValueError(f"top_logprobs must be 0 to {head.out_features}, got {top_logprobs}")


def _needs_all(head: Head, processors: Sequence[Any], chain: Chain) -> str | None:
    if bridge.is_hooked(head):
        return "a hook on the head may change its scores"
    if head.transform is None or not head.transform.rises:
        return "what this model does to its logits after the head is not understood"
    if chain.whole:
        last = type(processors[chain.whole - 1]).__name__
        return f"{last} may change any token's score, or needs every one"
    return None


def _whole(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    config: Any,
    top: int | None,
    rest: dict[str, Any],
) -> Any:
    """transformers' own loop, and log-probabilities from the logits that it gives."""
    asked = copy.copy(config)
    asked.output_logits = config.output_logits or top is not None
    result = bridge.decode_whole(model, input_ids, processors, asked, **rest)
    if top is not None:
        new = result.sequences[:, input_ids.shape[-1] :]
        log_p = torch.stack(result.logits, 1).log_softmax(-1)
        alive = _alive(new, config)
        result["log_probs"] = log_p.gather(-1, new.unsqueeze(-1)).squeeze(-1).masked_fill(~alive, 0)
        if top:
            values, tokens = log_p.topk(top, -1)
            result["top_log_probs"] = values.masked_fill(~alive.unsqueeze(-1), 0)
            result["top_tokens"] = tokens.masked_fill(~alive.unsqueeze(-1), 0)
    return result


def _alive(new: Tensor, config: Any) -> Tensor:
    """Which of the new tokens `(B, T)` come no later than their row's end."""
    ends = getattr(config, "_eos_token_tensor", None)
    if ends is None:
        return torch.ones_like(new, dtype=torch.bool)
    ended = torch.isin(new, ends.to(new.device)).long()
    return ended.cumsum(-1) - ended == 0


class _Logits(Head):
    """A head whose hidden states are the model's logits themselves."""

    def __init__(self, vocab: int):
        super().__init__(vocab, vocab)
        self.transform = LogitTransform()

    def scores(self, hidden: Tensor) -> Tensor:
        return hidden


class _Chooser:
    """The next token of each row, from the head or from all logits."""

    def __init__(
        self,
        processors: Sequence[Any],
        chain: Chain,
        head: Head,
        asked: bridge.AskedHead | None,
        sample: bool,
        top: int | None,
    ):
        self.first = list(processors)[: chain.whole]
        self.chain, self.asked, self.sample, self.top = chain, asked, sample, top
        self.vocab, self.rows = head.out_features, _Logits(head.out_features)
        self.rows.kernels = head.kernels
        self.count = _FEW
        self.notes: list[dict[str, Tensor]] = []

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        if self.asked is not None:
            return self._choose(self.asked, input_ids, None)
        scores = logits
        for processor in self.first:
            scores = processor(input_ids, scores)

        def ask(question: bridge.Question, rows: Tensor = scores) -> Any:
            return question(self.rows, rows)

        return self._choose(ask, input_ids, logits)

    def _choose(self, ask: Ask, input_ids: Tensor, logits: Tensor | None) -> Tensor:
        temperature = self.chain.temperature
        if self.sample and self.chain.open:
            token = ask(lambda head, x: head.sample(x, temperature=temperature))
            self._note(ask, token, logits, None)
            return cast(Tensor, token)
        known = self.top is not None and temperature == 1 and logits is None
        while True:
            first = self._best(ask, known)
            found: Candidates | None = first
            for step in self.chain.steps:
                found = None if found is None else step(input_ids, found)
            chosen = None if found is None else self._pick(found)
            if found is not None and chosen is not None:
                self._note(ask, chosen, logits, first if known else None)
                left = int((found.logits > -torch.inf).sum(-1).max()) if found.closed else 1
                self.count = min(max(_FEW, 2 * left, self.count * 7 // 8), self.vocab)
                return chosen
            self.count = min(_GROWTH * self.count, self.vocab)

    def _best(self, ask: Ask, known: bool) -> Candidates:
        temperature, total = self.chain.temperature, None
        count = min(max(self.count, self.top or 1), self.vocab)
        if self.chain.total or known:
            values, tokens, total = ask(lambda head, x: head.topk_logsumexp(x, count, temperature))
        else:
            values, tokens = ask(lambda head, x: head.topk(x, count))
        values = values if temperature == 1 else values / temperature
        outside = (
            torch.full_like(values[:, 0], -torch.inf) if count == self.vocab else values[:, -1]
        )
        return Candidates(tokens, values, outside, total)

    def _pick(self, found: Candidates) -> Tensor | None:
        """The chosen tokens `(B,)`; None where a token that is no candidate may be as good."""
        if self.sample:
            place = gumbel_max(found.logits, None).unsqueeze(-1)
            return found.tokens.gather(-1, place).squeeze(-1)
        best = found.logits[:, :1]
        if not found.surely_above(best[:, 0]):
            return None
        # of equal ones the first, as argmax
        return found.tokens.masked_fill(found.logits < best, self.vocab).amin(-1)

    def _note(
        self, ask: Ask, token: Tensor, logits: Tensor | None, first: Candidates | None
    ) -> None:
        """Log-probabilities of the model itself."""
        if self.top is None:
            return
        if logits is not None:  # before the first processors

            def ask(question: bridge.Question, rows: Tensor = logits) -> Any:
                return question(self.rows, rows)

        count = max(1, self.top)
        if first is None:
            values, tokens, total = ask(lambda head, x: head.topk_logsumexp(x, count))
            own = ask(lambda head, x: head.log_prob(x, token))
        else:
            values, tokens, total = first.logits, first.tokens, first.log_total()
            own = values.masked_fill(tokens != token.unsqueeze(-1), -torch.inf).amax(-1) - total
        note = {"log_probs": own}
        if self.top:
            note["top_log_probs"] = (values - total.unsqueeze(-1))[:, : self.top]
            note["top_tokens"] = tokens[:, : self.top]
        self.notes.append(note)

    def recorded(self) -> dict[str, Tensor]:
        return {name: torch.stack([note[name] for note in self.notes], 1) for name in self.notes[0]}
