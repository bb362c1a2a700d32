"""The parameter `weight` of a patched head is no matrix of logits, and says so to code that takes it for one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.generation.candidate_generator import AssistantToTargetTranslator

import hf_softheads as sh
from hf_softheads.heads import SVM, VQ, Cosine, Dense, LowRank, Quantized
from hf_softheads.heads.base import HeadSpec
from tests.conftest import VOCAB, make_model

SPECS: list[HeadSpec] = [VQ(24), Quantized(4), LowRank(8), Cosine(), SVM()]
READERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": lambda h, w: F.linear(h, w),
    "@": lambda h, w: h @ w,
    "@ of the transpose": lambda h, w: h @ w.T,
    "t()": lambda h, w: torch.mm(h, w.t()),
    "a slice": lambda h, w: h @ w[:4].t(),
    "rows": lambda h, w: w.index_select(0, torch.tensor([0])),
    "a cast": lambda h, w: F.linear(h.double(), w.to(torch.float64)),
    "float()": lambda h, w: h @ w.bfloat16().float().T,
    "einsum": lambda h, w: torch.einsum("nd,vd->nv", h, w),
    "embedding": lambda h, w: F.embedding(torch.tensor([0]), w),
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("reader", READERS)
def test_refuses_products_by_other_code(spec: HeadSpec, reader: str) -> None:
    model = sh.patch(make_model("llama"), head=spec)
    for weight in (model.lm_head.weight, copy.deepcopy(model).lm_head.weight):
        with pytest.raises(ValueError, match="test_head_weight reads rows or products"):
            READERS[reader](torch.zeros(2, 32), weight)


def test_a_dense_head_is_what_it_seems(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), head=Dense())
    states: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, args, __: states.append(args[0]))
    logits = model(tokens).logits
    assert torch.equal(F.linear(states[0], model.lm_head.weight), logits)
    assert type(model.lm_head.weight) is nn.Parameter


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_everything_else_sees_an_ordinary_parameter(
    spec: HeadSpec, tokens: Tensor, tmp_path: Path
) -> None:
    plain = sh.patch(make_model("llama"), head=spec)
    weight = plain.lm_head.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.is_leaf
    assert weight is dict(plain.named_parameters())["lm_head.weight"]
    assert type(plain.state_dict()["lm_head.weight"]) is Tensor
    assert type(weight.detach()) is type(weight.data) is Tensor
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)
    with pytest.raises(ValueError, match="reads rows or products"):
        loaded.lm_head.weight[0]
    for foreach in (False, True):
        model = copy.deepcopy(plain).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=foreach)
        model(tokens, labels=tokens).loss.backward()
        assert type(model.lm_head.weight.grad) is Tensor
        optimizer.step()
        assert not torch.equal(model.lm_head.weight.detach(), weight.detach())
    half = copy.deepcopy(plain).to(torch.bfloat16)
    assert half(tokens).logits.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(tokens).logits.isfinite().all()


def test_compiles_in_one_graph(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), head=VQ(24))
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.lm_head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), model.lm_head(hidden))


def test_unpatched_model_has_its_own_parameter_again() -> None:
    model = make_model("llama")
    before = model.lm_head.weight
    sh.unpatch(sh.patch(model, head=VQ(24)))
    assert model.lm_head.weight is before
    assert type(before) is nn.Parameter


def words(count: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(count)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    )


@pytest.mark.parametrize("spec", [*SPECS, None], ids=lambda s: getattr(s, "name", "unpatched"))
def test_pruned_head_of_an_assistant(spec: HeadSpec | None) -> None:
    """transformers keeps the rows of the tokens that both models know, when it samples with an assistant."""
    assistant: Any = make_model("llama")
    if spec is not None:
        sh.patch(assistant, head=spec)
    head = assistant.get_output_embeddings()

    def translate() -> Any:
        return AssistantToTargetTranslator(words(50), words(VOCAB), 50, assistant, True)

    if spec is None:
        assert translate().assistant_prune_lm_head
        return
    with pytest.raises(ValueError, match=r"transformers\.pytorch_utils reads rows .* turn off"):
        translate()
    assert assistant.get_output_embeddings() is head
