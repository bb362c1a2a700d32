"""What transformers hands to an attention layer (masks, biases, caches, dropout), against the plain definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_softheads as sh
from hf_softheads.attention.base import AttentionSpec, attend, run
from hf_softheads.attention.call import Geometry, Inputs
from hf_softheads.bridge import attention_forward, visible
from tests.conftest import make_model

sa = sh.attention
B, H, KV, T, D = 2, 4, 2, 6, 8
LOWEST = torch.finfo(torch.float32).min


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(query: Tensor, key: Tensor, value: Tensor, scores_plus: Tensor) -> Tensor:
    """`softmax(q · k / √D + scores_plus) · v`, as transformers lays it out: `(B, Q, H, D)`."""
    key, value = (x.repeat_interleave(H // KV, 1) for x in (key, value))
    scores = query @ key.mT * D**-0.5 + scores_plus
    return (scores.softmax(-1) @ value).transpose(1, 2)


def layer(spec: AttentionSpec | None) -> nn.Module:
    """An attention layer as the interface sees it, patched or not."""
    module = nn.Module().eval()
    if spec is not None:
        geometry = Geometry(heads=H, kv_heads=KV, head_dim=D, hidden_size=H * D)
        module.add_module("softheads", spec.module(geometry))
    return module


def tensors(queries: int = T) -> tuple[Tensor, Tensor, Tensor]:
    return normal(B, H, queries, D), normal(B, KV, T, D, seed=1), normal(B, KV, T, D, seed=2)


def future() -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


every_layer = pytest.mark.parametrize("spec", [None, sa.Softmax()], ids=["unpatched", "patched"])


@every_layer
def test_every_form_of_a_mask_means_the_same(spec: AttentionSpec | None) -> None:
    """Boolean, additive with the lowest number, additive with -inf; and with more keys than there are."""
    query, key, value = tensors()
    hidden = future().expand(B, 1, T, T).clone()
    hidden[1, :, :, :2] = True  # padding on the left of the second sample
    hidden[1, :, :2] = future()[:2]  # whose own queries see something, as transformers does it
    want = plain(query, key, value, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf))
    for low in (LOWEST, -torch.inf):
        mask = torch.zeros(hidden.shape).masked_fill(hidden, low)
        keep, bias = visible(mask, query, key, causal=True)
        assert keep is not None
        assert torch.equal(keep, ~hidden)
        assert bias is None or not bias.any()
        for given in (mask, torch.nn.functional.pad(mask, (0, 3), value=low)):
            got, _ = attention_forward(layer(spec), query, key, value, given)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got, _ = attention_forward(layer(spec), query, key, value, ~hidden)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_layer
def test_an_additive_mask_keeps_its_bias(spec: AttentionSpec | None) -> None:
    query, key, value = tensors()
    bias = normal(B, H, T, T, seed=3)
    mask = bias.masked_fill(future(), LOWEST)
    want = plain(query, key, value, bias.masked_fill(future(), -torch.inf))
    got, _ = attention_forward(layer(spec), query, key, value, mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_layer
def test_a_position_bias_is_added_to_that_of_the_mask(spec: AttentionSpec | None) -> None:
    query, key, value = tensors()
    bias, position = normal(B, 1, T, T, seed=3), normal(1, H, T, T, seed=4)
    hide = torch.zeros(T, T).masked_fill(future(), -torch.inf)
    for mask, total in ((None, position), (bias.masked_fill(future(), LOWEST), bias + position)):
        want = plain(query, key, value, total + hide)
        got, _ = attention_forward(layer(spec), query, key, value, mask, position_bias=position)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_layer
def test_a_static_cache_is_read_where_it_was_written(spec: AttentionSpec | None) -> None:
    """When it is filled for the first time no mask comes, and only as many entries are written as there are queries."""
    query, key, value = tensors(queries=4)
    want = plain(query, key[:, :, :4], value[:, :, :4], torch.full((4, 4), -torch.inf).triu(1))
    spoiled = [x.index_fill(2, torch.tensor([4, 5]), torch.nan) for x in (key, value)]
    got, _ = attention_forward(layer(spec), query, *spoiled, None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_layer
def test_dropout_of_the_layer_is_applied_in_training_only(spec: AttentionSpec | None) -> None:
    query, key, value = tensors()
    module = layer(spec)

    def output() -> Tensor:
        return attention_forward(module, query, key, value, None, dropout=0.5)[0]

    want = plain(query, key, value, torch.full((T, T), -torch.inf).triu(1))
    torch.testing.assert_close(output(), want, rtol=1e-5, atol=1e-5)
    module.train()
    torch.manual_seed(0)
    first = output()
    assert not torch.equal(first, output())
    # the first query sees one key: its output is 0 or twice that key's value
    twice = 2 * value[:, :, 0].repeat_interleave(H // KV, 1)
    kept = (first[:, 0] != 0).any(-1)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(first[:, 0], torch.where(kept.unsqueeze(-1), twice, 0))


@pytest.mark.parametrize("left", [0, 2])
def test_a_window_holds_the_latest_keys(left: int) -> None:
    """By the plain definition in blocks of queries: own key included, padding on the left not counted."""
    query, key, value = (x.double() for x in tensors())
    keep = ~future().expand(B, 1, T, T)
    keep = keep & (torch.arange(T) >= left)
    row, column = torch.arange(T)[:, None], torch.arange(T)
    near = keep & (row - column < 3)
    want = plain(query, key, value, torch.zeros(near.shape).masked_fill(~near, -torch.inf))
    for mask in [keep] if left else [keep, None]:
        inputs = Inputs(query, key, value, mask, D**-0.5, window=3, compiled=False)
        got = run(sa.Softmax(), {}, inputs).transpose(1, 2)
        torch.testing.assert_close(got[:, left:], want[:, left:])


@pytest.mark.parametrize("spec", [sa.Softmax(), sa.Softpick()], ids=lambda s: s.name)
def test_a_soft_cap_has_its_gradient(spec: AttentionSpec) -> None:
    """In float64, which the blocks of queries compute."""
    leaves = [x[:1, :, :4].double().requires_grad_() for x in tensors()]

    def capped(*given: Tensor) -> Tensor:
        return attend(spec, *given, softcap=0.7)

    assert torch.autograd.gradcheck(capped, leaves, atol=1e-6)
    if spec == sa.Softmax():
        query, key, value = (x.detach() for x in leaves)
        scores = query @ key.repeat_interleave(2, 1).mT * D**-0.5
        scores = (0.7 * (scores / 0.7).tanh()).masked_fill(future()[:4, :4], -torch.inf)
        want = scores.softmax(-1) @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(capped(query, key, value), want)


@pytest.mark.parametrize(
    ("arguments", "patched"),
    [
        ({"attention": "softpick", "layers": [-1]}, [3]),
        ({"attention": "softpick", "layers": [-4, 2]}, [0, 2]),
        ({"attention": {-2: "softpick", 0: "ssmax"}}, [0, 2]),
    ],
)
def test_negative_layers_count_from_the_end(arguments: dict[str, Any], patched: list[int]) -> None:
    model = sh.patch(make_model("llama", num_hidden_layers=4), **arguments)
    layers = enumerate(model.model.layers)
    assert [i for i, block in layers if hasattr(block.self_attn, "softheads")] == patched
