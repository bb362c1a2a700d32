"""`generate` in its modes: a patched head decodes as the untouched model with the same matrix would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import hf_softheads as sh
from tests.clients.samples import as_dense, patched
from tests.conftest import make_model

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 0.8},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture
def padded(tokens):
    """Two prompts, the second one shorter and padded on the left."""
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: Any, batch: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, **{**GREEDY, **options})


@pytest.mark.client(
    "generate",
    works="greedy, beams, sampling, static cache, no cache, prompt lookup: the tokens that `nn.Linear` with the "
    "same matrix gives",
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dense", "low_rank", "quantized", "product_vq"])
def test_a_patched_head_decodes_as_its_matrix(name, mode, padded):
    if mode == "prompt lookup":  # transformers speculates for one prompt at a time
        padded = {key: value[:1] for key, value in padded.items()}
    model = patched(name)
    found = generate(model, padded, **MODES[mode])
    assert torch.equal(found, generate(as_dense(model), padded, **MODES[mode]))
    assert len(found[0].unique()) > 3  # a constant would prove nothing


@pytest.mark.client(
    "generate", works="patched attention and VQ: every cache gives the tokens of no cache"
)
@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache", "prompt lookup"])
@pytest.mark.parametrize(
    "plan",
    [{"attention": "ssmax"}, {"attention": "softpick"}, {"head": sh.heads.VQ(codes=24)}],
    ids=["ssmax", "softpick", "vq"],
)
def test_every_cache_gives_the_tokens_of_no_cache(plan, mode, padded):
    if mode == "prompt lookup":
        padded = {key: value[:1] for key, value in padded.items()}
    model = sh.patch(make_model("llama"), **plan)
    beams = {key: value for key, value in MODES[mode].items() if key == "num_beams"}
    expected = generate(model, padded, use_cache=False, **beams)
    assert torch.equal(generate(model, padded, **MODES[mode]), expected)


def continuous(model: Any, tokens: torch.Tensor) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else a share of memory
    found = model.generate_batch(
        [row.tolist() for row in tokens], generation_config=config, continuous_batching_config=small
    )
    return [found[key].generated_tokens for key in sorted(found)]


@pytest.mark.client("continuous batching", works="`generate_batch` with a patched head")
@pytest.mark.parametrize("name", ["dense", "vq", "quantized"])
def test_continuous_batching(name, tokens):
    model = patched(name)
    expected = model.generate(tokens, **GREEDY)[:, tokens.shape[1] :]
    assert continuous(model, tokens) == expected.tolist()


@pytest.mark.client(
    "continuous batching",
    refused="`generate_batch` with patched attention",
    why="its paged cache knows transformers' own implementations only; the message names `hf_softheads`",
)
def test_continuous_batching_of_patched_attention(tokens):
    model = sh.patch(make_model("llama"), attention="ssmax")
    before = model.generate(tokens, **GREEDY)
    with pytest.raises(ValueError, match="hf_softheads is not supported for continuous batching"):
        continuous(model, tokens)
    assert torch.equal(model.generate(tokens, **GREEDY), before)
