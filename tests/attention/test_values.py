"""Values that are tempered before they enter a cache: `selective(values=True)` in whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

import hf_softheads as sh
from tests.attention.test_models import GREEDY, close, left_pad, patched
from tests.conftest import make_model

SPEC = sh.attention.Selective(token=True, values=True, width=4)
FAMILIES = [
    "llama",
    "mistral",
    "gemma2",
    "gpt2",
    "phi3",
    "gpt_neox",
    "opt",
]  # own and fused projections


def trained(family: str, **changes: Any) -> Any:
    """Temperatures between 0.3 and 1.7, so that forgetting them shows."""
    model = patched(family, SPEC, **changes)
    for name, p in model.named_parameters():
        if name.endswith(("values_out", "token_out")):
            p.data *= 20
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_caches(family: str, tokens: Tensor) -> None:
    """Greedy decoding with every cache, left-padded, equals decoding that keeps none."""
    model = trained(family)
    inputs = left_pad(tokens, 3)
    inputs.pop("position_ids")
    want = model.generate(**inputs, use_cache=False, **GREEDY)
    for cache in ("dynamic", "static"):
        got = model.generate(**inputs, cache_implementation=cache, **GREEDY)
        assert torch.equal(got, want), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token(family: str, tokens: Tensor) -> None:
    model = trained(family)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        assert (make_model(family)(tokens).logits - whole).abs().max() > 1e-2
        cache: Any = DynamicCache()
        steps = [model(tokens[:, :5], past_key_values=cache, use_cache=True).logits]
        for t in range(5, tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
        close(torch.cat(steps, 1), whole)


def test_the_cache_holds_tempered_values(tokens: Tensor) -> None:
    model, plain = trained("llama"), make_model("llama")
    with torch.no_grad():
        got = model(tokens, use_cache=True).past_key_values.layers[0].values
        values = plain(tokens, use_cache=True).past_key_values.layers[0].values
    ratio = (got / values)[:, :, :, 0]
    assert (ratio - 1).abs().max() > 0.1
    close(got, values * ratio[..., None], 1e-5)  # one temperature a token, the same in all heads
    close(ratio[:, 0], ratio[:, 1], 1e-5)


def test_files_beams_training_and_compilation(tokens: Tensor, tmp_path: Any) -> None:
    model = trained("llama")
    want = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, want)
    options = {**GREEDY, "num_beams": 3}
    beams = again.generate(tokens, **options)
    assert torch.equal(beams, again.generate(tokens, use_cache=False, **options))
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(tokens, use_cache=False).logits, want, 1e-5)
        close(compiled(tokens, use_cache=True).logits, want, 1e-5)
    torch._dynamo.reset()
    again.train()
    again(tokens, labels=tokens).loss.backward()
    moved = [n for n, p in again.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(n.endswith("values_in") for n in moved)
    sh.unpatch(model)
    assert torch.equal(model(tokens).logits, make_model("llama")(tokens).logits)


def test_what_cannot_be_tempered_is_refused(tokens: Tensor) -> None:
    model = trained("llama")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=None, past_key_values=cache
        )
    fresh = make_model("llama")
    fresh.model.layers[1].self_attn.is_kv_shared_layer = True
    before = fresh(tokens).logits
    with pytest.raises(ValueError, match=r"layers\.1.*values of another layer"):
        sh.patch(fresh, attention=SPEC)
    assert torch.equal(fresh(tokens).logits, before)
    sh.patch(fresh, attention=SPEC, layers=[0])
