"""`generate(custom_generate=sh.decoding.candidates)`: the tokens and the law of plain `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

import hf_softheads as sh
from hf_softheads.decoding.chain import chain_of
from tests.clients.samples import patched
from tests.conftest import VOCAB, make_model

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
FEW = ["dense", "hierarchical", "quantized", "screened", "transform_coded", "vq"]
CHAINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bans": {
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [5, 9, 40],
        "bad_words_ids": [[7], [8, 9]],
    },
    "end": {"eos_token_id": 50, "min_new_tokens": 4, "renormalize_logits": True},
}
LAWS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.4, "top_k": 0},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8, "top_k": 0, "temperature": 1.3},
    "min-p": {"min_p": 0.05, "top_k": 0, "temperature": 1.2},
    "epsilon": {"epsilon_cutoff": 0.02, "top_k": 0},
    "all": {
        "repetition_penalty": 1.3,
        "temperature": 1.2,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.01,
    },
    "typical": {"top_k": 20, "typical_p": 0.8, "eta_cutoff": 0.01},
}


@pytest.fixture
def padded(tokens):
    """Two prompts, the second one shorter and padded on the left."""
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def by_candidates(model: Any, batch: Any, **options: Any) -> Any:
    return model.generate(**batch, **options, custom_generate=sh.decoding.candidates)


@pytest.mark.client(
    "generate",
    works="`custom_generate=sh.decoding.candidates`: greedy search from the best tokens of a head",
)
@pytest.mark.parametrize("name", FEW)
def test_greedy_tokens_are_those_of_generate(name, padded):
    model = patched(name)
    for chain in CHAINS.values():
        options = {**GREEDY, **chain}
        expected = model.generate(**padded, **options)
        assert torch.equal(by_candidates(model, padded, **options), expected)
    assert model.lm_head.question is None


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_what_a_family_does_after_its_head(family, padded):
    model = sh.patch(make_model(family), head=sh.heads.Quantized(8))
    for options in ({}, {"repetition_penalty": 1.5}):
        expected = model.generate(**padded, **GREEDY, **options)
        assert torch.equal(by_candidates(model, padded, **GREEDY, **options), expected)


@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_caches(cache, padded):
    model = patched("screened")
    options = {**GREEDY, **cache, "disable_compile": True}
    expected = model.generate(**padded, **options)
    assert torch.equal(by_candidates(model, padded, **options), expected)


class Recorded(LogitsProcessor):
    """Keeps what it is given: last in a chain, the processed scores."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores
        return scores


def law_of_generate(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    """The distribution of the first new token, `(V,)`, by plain `generate`."""
    out = model.generate(
        prompt,
        do_sample=True,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return out.scores[0][0].double().softmax(-1)


@pytest.mark.client("generate", works="sampling from candidates: the law of plain sampling")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["vq", "screened"])
def test_draws_follow_the_law_of_generate(name, law, tokens):
    """And without the warning that all logits are computed."""
    model, prompt, draws = patched(name), tokens[:1, :3], 500
    expected = law_of_generate(model, prompt, **LAWS[law])
    torch.manual_seed(3)
    drawn = by_candidates(
        model,
        {"input_ids": prompt.expand(draws, -1).contiguous()},
        do_sample=True,
        max_new_tokens=1,
        **LAWS[law],
    )[:, -1]
    counts = torch.bincount(drawn, minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0  # nothing that was cut
    order = expected.argsort(descending=True)
    often = order[expected[order] * draws >= 5]
    observed = torch.cat([counts[often], (draws - counts[often].sum()).view(1)])
    wanted = torch.cat([expected[often], (1 - expected[often].sum()).clamp_min(0).view(1)]) * draws
    used = wanted > 1e-6
    if used.sum() > 1:
        scale = observed[used].sum() / wanted[used].sum()
        assert stats.chisquare(observed[used], wanted[used] * scale).pvalue > 1e-3


class Raises(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 30.0 * (torch.arange(scores.shape[-1]) == 77)


class Bans(LogitsProcessor):
    on_candidates = "lowers"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)


def test_a_processor_that_needs_all_logits_gets_them(padded):
    model = patched("screened")
    own = LogitsProcessorList([Raises()])
    expected = model.generate(**padded, **GREEDY, logits_processor=own)
    with pytest.warns(UserWarning, match="computes all logits here: Raises"):
        found = by_candidates(model, padded, **GREEDY, logits_processor=own)
    assert torch.equal(found, expected)
    assert (found[:, -5:] == 77).all()


def test_a_processor_that_declares_itself_works_on_candidates(padded):
    model = patched("quantized")
    own = LogitsProcessorList([Bans()])
    expected = model.generate(**padded, **GREEDY, logits_processor=own)
    assert torch.equal(by_candidates(model, padded, **GREEDY, logits_processor=own), expected)
    assert (expected[:, -5:] % 2 == 1).all()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"output_scores": True}])
def test_beams_and_scores_are_those_of_generate(options, padded):
    model = patched("vq")
    options = {**GREEDY, **options, "return_dict_in_generate": True}
    expected, found = model.generate(**padded, **options), by_candidates(model, padded, **options)
    assert torch.equal(found.sequences, expected.sequences)
    if "output_scores" in options:
        assert all(map(torch.equal, found.scores, expected.scores))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"do_sample": True, "top_k": 0, "temperature": 0.9},
        {"do_sample": True, "top_p": 0.8},
        {"output_scores": True},
    ],
)
@pytest.mark.parametrize("name", ["vq", "screened"])
def test_log_probabilities_are_those_of_the_model(name, options, padded):
    model = patched(name)
    options = {**GREEDY, "eos_token_id": 50, **options}
    torch.manual_seed(0)
    out = by_candidates(model, padded, **options, return_dict_in_generate=True, top_logprobs=3)
    new = out.sequences[:, 12:]
    mask = torch.cat([padded["attention_mask"], torch.ones_like(new)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(out.sequences, attention_mask=mask, position_ids=positions).logits
    log_p = logits[:, 11:-1].log_softmax(-1)
    ended = (new == 50).long()
    alive = ended.cumsum(-1) - ended == 0
    expected = log_p.gather(-1, new[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs, expected.where(alive, 0.0), atol=2e-4, rtol=1e-4)
    best = log_p.topk(3, -1).values.where(alive[..., None], 0.0)
    torch.testing.assert_close(out.top_log_probs, best, atol=2e-4, rtol=1e-4)
    picked = log_p.gather(-1, out.top_tokens).where(alive[..., None], 0.0)
    torch.testing.assert_close(picked, best, atol=2e-4, rtol=1e-4)


class Streamed:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_and_stop_strings(tokens):
    model, streamer = patched("quantized"), Streamed()
    found = by_candidates(model, {"input_ids": tokens[:1]}, **GREEDY, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == found[0].tolist()
    words = AutoTokenizer.from_pretrained(sh.embedded.FOLDER)
    stop = words.decode(found[0, 14:15])
    options = {**GREEDY, "stop_strings": [stop], "tokenizer": words, "pad_token_id": 0}
    stopped = by_candidates(model, {"input_ids": tokens[:1]}, **options)
    assert torch.equal(stopped, model.generate(tokens[:1], **options))
    assert stopped.shape[1] <= 15


def test_a_head_under_a_hook(padded):
    model = patched("dense")
    model.lm_head.register_forward_hook(lambda m, i, out: -out)
    expected = model.generate(**padded, **GREEDY)
    with pytest.warns(UserWarning, match="a hook on the head"):
        assert torch.equal(by_candidates(model, padded, **GREEDY), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 3}, "asked for assisted_generation"),
        ({"top_logprobs": 2}, "return_dict_in_generate=True"),
        ({"top_logprobs": -1, "return_dict_in_generate": True}, "must be 0 to 96, got -1"),
        (
            {"top_logprobs": 1, "return_dict_in_generate": True, "num_beams": 2},
            "leave num_beams out",
        ),
    ],
)
def test_what_is_refused(options, message, tokens):
    with pytest.raises(ValueError, match=message):
        by_candidates(patched("dense"), {"input_ids": tokens[:1]}, **GREEDY, **options)


def test_an_assistant_and_an_unpatched_model_are_refused(tokens):
    batch = {"input_ids": tokens[:1]}
    with pytest.raises(ValueError, match="asked for assisted_generation"):
        by_candidates(patched("dense"), batch, **GREEDY, assistant_model=make_model("llama", 1))
    with pytest.raises(ValueError, match=r"sh\.patch\(model, head=…\) first"):
        by_candidates(make_model("llama"), batch, **GREEDY)


def test_ties_go_to_the_first_token_as_in_argmax():
    """A head that gives all tokens one logit, and one in which a few share the best."""
    from hf_softheads.decoding.candidates import _Chooser

    rows = torch.zeros(2, VOCAB)
    rows[1, 20:90] = 3.0
    chooser = _Chooser([], chain_of([], VOCAB, False), patched("dense").lm_head, None, False, None)
    assert chooser(torch.zeros(2, 1, dtype=torch.long), rows).tolist() == [0, 20]


def _left(chooser: Any, ids: Tensor, logits: Tensor) -> Any:
    """The candidates that a chooser would draw from."""
    kept = []

    def pick(found: Any) -> Tensor:
        kept.append(found)
        return torch.as_tensor(found.tokens[:, 0])

    chooser._pick = pick
    chooser(ids, logits)
    return kept[-1]


@pytest.mark.parametrize("seed", range(3))
def test_steps_on_candidates_equal_processors_on_all_logits(seed):
    """Chains of transformers' processors, on logits with ties: the same tokens are left, with the same law."""
    from transformers import (
        EpsilonLogitsWarper,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from hf_softheads.decoding.candidates import _Chooser

    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, VOCAB, generator=generator) * 3 * 4).round() / 4
    ids = torch.randint(VOCAB, (4, 9), generator=generator)
    cutting = [
        TopKLogitsWarper(9),
        MinPLogitsWarper(0.2, min_tokens_to_keep=3),
        EpsilonLogitsWarper(0.05),
    ]
    for cut in [*cutting, TopPLogitsWarper(0.7)]:
        for before in ([], [TemperatureLogitsWarper(2.0)], [RepetitionPenaltyLogitsProcessor(2.0)]):
            processors = [*before, cut, TopKLogitsWarper(5), TemperatureLogitsWarper(0.5)]
            chain = chain_of(processors, VOCAB, True)
            chooser = _Chooser(processors, chain, patched("dense").lm_head, None, True, None)
            left = _left(chooser, ids, logits)
            ours = (
                torch.full_like(logits, -torch.inf)
                .scatter(-1, left.tokens, left.logits)
                .softmax(-1)
            )
            expected = LogitsProcessorList(processors)(ids, logits).softmax(-1)
            if isinstance(
                cut, TopPLogitsWarper | MinPLogitsWarper
            ):  # of equal tokens a sort decides
                ours, expected = ours.sort(-1).values, expected.sort(-1).values
            torch.testing.assert_close(ours, expected)


def test_a_draft_heads_rows_by_the_maps_of_its_tokens():
    head = patched("draft").lm_head
    maps = head.token_maps()
    rows = torch.arange(len(head.weight))
    assert torch.equal(rows + maps["d2t"], head.ids.long())
    assert torch.equal(maps["t2d"].nonzero().flatten(), head.ids.long())
    assert maps["t2d"].shape == (VOCAB,)
