"""The trial run of `patch`: a model whose attention would be computed by something else is refused and left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_softheads as sh
from tests.conftest import make_model

sa = sh.attention


def refused(model: Any, tokens: Tensor, message: str, **arguments: Any) -> None:
    """`patch` raises, and leaves no trace of itself."""
    kind, before = type(model), model(tokens).logits
    with pytest.raises(ValueError, match=message):
        sh.patch(model, attention=sa.Softmax(), **arguments)
    assert type(model) is kind
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "softheads") for module in model.modules())
    assert torch.equal(model(tokens).logits, before)


def test_a_keyword_that_nothing_here_understands(tokens: Tensor) -> None:
    """The variant would ignore it, whatever it does to the attention."""
    model = make_model("llama")
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "slant": 0.5}), with_kwargs=True
    )
    refused(model, tokens, r"LlamaForCausalLM passes slant to its attention.*silently wrong")
    sh.patch(model, attention=sa.Softmax(), layers=[0])  # whose layer does not get it


def test_a_keyword_that_is_given_as_none_says_nothing(tokens: Tensor) -> None:
    model = make_model("llama")
    before = model(tokens).logits
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "slant": None}), with_kwargs=True
    )
    sh.patch(model, attention=sa.Softmax())
    torch.testing.assert_close(model(tokens).logits, before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_layer_that_is_never_called(layers: Any, tokens: Tensor) -> None:
    model = make_model("llama")
    model.model.layers[1].forward = lambda hidden_states, *_, **__: hidden_states
    refused(model, tokens, r"layers \[1\] was never called.*bypasses it", layers=layers)
    sh.patch(model, attention=sa.Softmax(), layers=[0])


def test_a_model_that_does_not_run_on_tokens(tokens: Tensor) -> None:
    model = make_model("llama")
    layer, own = model.model.layers[1], model.model.layers[1].forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        image = None if hidden.shape[1] == 4 else hidden
        return own(image.to(hidden.dtype), *args, **kwargs)  # type: ignore[union-attr]

    layer.forward = forward
    refused(model, tokens, r"LlamaForCausalLM could not be run on a few tokens.*no attribute 'to'")


def test_nothing_is_left_of_the_trial_run(tokens: Tensor) -> None:
    model = make_model("llama").train()
    sh.patch(model, attention=sa.Softpick())
    assert all(module.training for module in model.modules())
    assert not any("probe" in module.__dict__ for module in model.modules())
