"""Every head variant inside a model: patch, train, save, load, generate."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_softheads as sh
from hf_softheads import kernels
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.stats import HeadStats
from hf_softheads.plan import dense_head
from hf_softheads.registry import variants
from tests.conftest import make_model

NAMES = sorted(variants("head"))
VOCAB, DIM = 256, 16


@pytest.fixture(scope="module")
def dense() -> Any:
    return make_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=DIM,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=None,
    )


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCAB, (24, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stats(dense: Any, tokens: torch.Tensor) -> HeadStats:
    return sh.collect(dense, tokens)


def middle(name: str) -> HeadSpec:
    ladder = variants("head")[name].ladder(DIM, VOCAB)  # type: ignore[attr-defined]
    spec: HeadSpec = ladder[len(ladder) // 2]
    return spec


@pytest.fixture(scope="module")
def patched(
    dense: Any, stats: HeadStats, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, torch.dtype], Any]:
    """A model with a head of that name, which is fitted once in each precision."""
    folder = tmp_path_factory.mktemp("dense")
    dense.save_pretrained(folder)

    @functools.cache
    def once(name: str, dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return sh.patch(model, head=middle(name), stats=stats)

    return lambda name, dtype: copy.deepcopy(once(name, dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saves_loads_and_generates(
    name: str, dtype: torch.dtype, patched: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = patched(name, dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    prompt = tokens[:2, :5]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **options), model.generate(prompt, **options))
    for name_, tensor in model.get_output_embeddings().state_dict().items():
        other = loaded.get_output_embeddings().state_dict()[name_]
        assert tensor.dtype == other.dtype, name_
        assert torch.equal(tensor, other), name_
    assert str(middle(name).name) in str(sh.describe(loaded))


def divergence(model: Any, tokens: torch.Tensor) -> float:
    """Mean `KL(dense ‖ head)` on these tokens."""
    found = sh.evaluate(model, tokens, reference=dense_head(model)).kl
    assert found is not None
    return found


@pytest.mark.parametrize("name", NAMES)
def test_trains_without_logits_and_repairs(name: str, patched: Any, tokens: torch.Tensor) -> None:
    model = patched(name, torch.float32).train()
    out = model(tokens[:4], labels=tokens[:4])
    model.eval()
    plain = model(tokens[:4], labels=tokens[:4])
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-3, atol=1e-4)
    out.loss.backward()
    assert all(p.grad is not None for p in model.get_output_embeddings().parameters())
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # something to repair, also where the fit reproduces the dense head
        for p in model.get_output_embeddings().parameters():
            noise = torch.randn(p.shape, generator=generator).to(p.dtype)
            p += 0.3 * p.square().mean().sqrt() * noise
    before = divergence(model, tokens)
    sh.repair_head(model, dense_head(model), tokens, steps=20, batch_size=256)
    assert divergence(model, tokens) < before


@pytest.mark.parametrize(
    "spec",
    [sh.heads.Quantized(4), sh.heads.TransformCoded(bits=6.0, tiers=2)],
    ids=lambda s: s.name,
)
@torch.no_grad()
def test_a_model_is_compiled_as_one_graph_with_its_kernels(
    spec: HeadSpec, tokens: torch.Tensor
) -> None:
    torch.compiler.reset()
    model = sh.patch(
        make_model("llama", vocab_size=VOCAB), head=spec, attention=sh.attention.SSMax()
    )
    expected = model(tokens).logits
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    by_operator = model.lm_head.kernel_or_reason(torch.zeros(1, 32)) is None
    assert ("softheads.scores" in graphs[0]) == by_operator
    assert ("softheads.attention" in graphs[0]) == (kernels.why_not("attention") is None)
