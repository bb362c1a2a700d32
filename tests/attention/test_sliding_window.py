"""Windows, sinks, dilation, two sides, and layers without attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hf_softheads as sh
from hf_softheads.attention.base import attend
from tests.attention.samples import left_padded, sample
from tests.attention.test_contract import close
from tests.attention.test_models import GREEDY, left_pad
from tests.conftest import make_model

sa = sh.attention


@pytest.mark.parametrize("padding", [0, 5])
def test_which_keys_are_seen(padding: int) -> None:
    spec = sa.SlidingWindow(window=3, sinks=2, dilation=2)
    total = 20 + padding
    inputs = sample(spec, batch=1, queries=total, keep=left_padded([20], total))
    one_hot = torch.eye(total).expand(1, 2, total, total)
    seen = inputs(value=one_hot)[0, 0, padding + 12, padding:] > 0
    assert seen.nonzero().flatten().tolist() == [0, 1, 8, 10, 12]


def test_a_wide_window_is_the_softmax() -> None:
    inputs = sample(sa.SlidingWindow(window=11))
    close("out", inputs(), inputs(spec=sa.Softmax()), 1e-6)


def test_encoders_have_two_sides() -> None:
    spec, every = (
        sa.SlidingWindow(window=2, sinks=0, two_sided=True),
        torch.ones(9, 9, dtype=torch.bool),
    )
    inputs = sample(spec, queries=9, batch=1)
    one_hot = torch.eye(9).expand(1, 2, 9, 9)
    seen = attend(spec, inputs.query, inputs.key, one_hot, every, causal=False)[0, 0] > 0
    assert torch.equal(seen, torch.ones(9, 9, dtype=torch.bool).tril(1).triu(-1))
    with pytest.raises(ValueError, match="two_sided=True"):
        attend(sa.SlidingWindow(), inputs.query, inputs.key, one_hot, every, causal=False)


def test_models_with_windows_and_without_attention(tokens: Tensor) -> None:
    model = make_model("llama")
    sh.patch(model, attention={0: sa.SlidingWindow(window=4, sinks=1), 1: sa.Drop()})
    inputs = left_pad(tokens, 3)
    inputs.pop("position_ids")
    want = model.generate(**inputs, use_cache=False, **GREEDY)
    for cache in ("dynamic", "static"):
        out = model.generate(
            **inputs, cache_implementation=cache, return_dict_in_generate=True, **GREEDY
        )
        assert torch.equal(out.sequences, want)
        assert out.past_key_values.layers[1].state.tensors == ()
    layer = model.model.layers[1]
    hidden = torch.randn(1, 3, 32)
    places = torch.arange(3)[None]
    embeddings = model.model.rotary_emb(hidden, places)
    got = layer(hidden, position_ids=places, position_embeddings=embeddings)
    close("residual", got, hidden + layer.mlp(layer.post_attention_layernorm(hidden)), 1e-6)
