"""Variants with a recurrent state inside models: masks, generation, caches of every kind, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, StaticCache

import hf_softheads as sh
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.bridge.cache_state import StateLayer
from tests.attention.samples import SPECS, label
from tests.attention.test_models import GREEDY, close, left_pad, patched
from tests.conftest import VOCAB, make_model

sa = sh.attention
LINEAR = [s for s in SPECS if s.has_state and s == type(s)()]
every_variant = pytest.mark.parametrize("spec", LINEAR, ids=label)
KINDS: list[AttentionSpec] = [sa.Hedgehog(features=4), sa.DecayLinear()]
every_kind = pytest.mark.parametrize("spec", KINDS, ids=label)


@every_variant
def test_decoding_equals_the_full_forward(spec: AttentionSpec, tokens: Tensor) -> None:
    """Left-padded, the first half at once and the rest token by token; the state is all that the layer keeps."""
    model = patched("llama", spec)
    inputs = left_pad(tokens, 3)
    inputs["attention_mask"][1, :5] = 0
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(**inputs, use_cache=False).logits
        cache, steps, sizes = DynamicCache(config=model.config), [], set()
        for piece in (
            slice(0, 7),
            slice(7, 8),
            slice(8, 12),
            *[slice(t, t + 1) for t in (12, 13, 14)],
        ):
            part = {n: inputs[n][:, piece] for n in ("input_ids", "position_ids")}
            mask = inputs["attention_mask"][:, : piece.stop]
            out = model(**part, attention_mask=mask, past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            layer = cache.layers[0]
            assert isinstance(layer, StateLayer)
            assert layer.get_seq_length() == piece.stop
            sizes.add(sum(t.numel() for t in layer.state.tensors))
    got = torch.cat(steps, 1)
    close(got[0, 3:], whole[0, 3:], 2e-5)
    close(got[1, 5:], whole[1, 5:], 2e-5)
    assert len(sizes) == 1
    alone = model(tokens[:1], use_cache=False).logits
    close(whole[:1, 3:], alone, 3e-5)


@every_kind
@pytest.mark.parametrize("layers", [None, [0], [1]])
def test_generation(spec: AttentionSpec, layers: list[int] | None, tokens: Tensor) -> None:
    """Batches, left padding, beams, samples, static caches and mixed layers, as without a cache."""
    model = sh.patch(make_model("llama"), attention=spec, layers=layers)
    inputs = left_pad(tokens, 3)
    inputs.pop("position_ids")
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        want = model.generate(**inputs, use_cache=False, **GREEDY, **options)
        for cache in ("dynamic", "static"):
            got = model.generate(**inputs, cache_implementation=cache, **GREEDY, **options)
            assert torch.equal(got, want), (options, cache)


@every_kind
def test_assisted_generation_takes_tokens_out_again(spec: AttentionSpec, tokens: Tensor) -> None:
    """As target and as assistant: rejected tokens leave the state, exactly."""
    model = sh.patch(make_model("llama"), attention=spec)
    assistant = sh.patch(make_model("llama", seed=1), attention=spec)
    want = model.generate(tokens[:1], **GREEDY)
    assert torch.equal(model.generate(tokens[:1], assistant_model=assistant, **GREEDY), want)
    assert torch.equal(model.generate(tokens[:1], prompt_lookup_num_tokens=2, **GREEDY), want)


def test_crop_is_exact_or_refused(tokens: Tensor) -> None:
    model = patched("llama", sa.Hedgehog(features=4))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :4], past_key_values=cache)
        kept = copy.deepcopy(cache)
        with pytest.raises(
            RuntimeError, match=r"cannot give back 2 tokens.*activate_past_recording"
        ):
            cache.crop(-2)
        cache.crop(0)
        cache.activate_past_recording()
        model(tokens[:, 4:9], past_key_values=cache)
        model(tokens[:, 9:10], past_key_values=cache)
        cache.crop(-4)
        model(tokens[:, 4:6], past_key_values=kept)
        assert cache.get_seq_length() == kept.get_seq_length() == 6
        for mine, theirs in zip(cache.layers, kept.layers, strict=True):
            for got, want in zip(mine.state.tensors, theirs.state.tensors, strict=True):
                close(got, want, 1e-6)
            assert torch.equal(mine.state.real, theirs.state.real)
        with pytest.raises(RuntimeError, match="cannot give back"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="negative"):
            cache.layers[0].crop(3)


def test_a_cache_is_reordered_repeated_selected_and_emptied(tokens: Tensor) -> None:
    model = patched("llama", sa.DecayLinear())
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(tokens[:, :6], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 3]))
        after = model(tokens[:, 6:].flip(0), past_key_values=cache).logits
        close(after.flip(0), model(tokens).logits[:, 6:], 2e-5)
        cache.reset()
        assert cache.get_seq_length() == 0
        close(model(tokens, past_key_values=cache).logits, model(tokens).logits, 1e-6)


@every_kind
def test_bfloat16_and_gradient_checkpointing(spec: AttentionSpec, tokens: Tensor) -> None:
    model = patched("llama", spec)
    want = model(tokens).logits
    half = patched("llama", spec).to(torch.bfloat16)
    close(half(tokens).logits.float(), want, 0.1)
    again = half.generate(tokens, use_cache=False, **GREEDY)
    assert torch.equal(half.generate(tokens, **GREEDY)[:, :13], again[:, :13])
    grads = []
    for checkpointing in (False, True):
        model = patched("llama", spec).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name from v6 on
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model(tokens, labels=tokens).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any(".softheads." in name for name in grads[0])
    for name, grad in grads[0].items():
        close(grads[1][name], grad, 1e-5)


def test_caches_of_another_kind_are_refused(tokens: Tensor) -> None:
    plain = make_model("llama")
    full = DynamicCache(config=plain.config)
    plain(tokens, past_key_values=full)
    model = patched("llama", sa.Hedgehog(features=4))
    with pytest.raises(ValueError, match=r"keys and values of 12 tokens.*hedgehog cannot read"):
        model(tokens[:, :1], past_key_values=full)
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    other = patched("llama", sa.DecayLinear())
    with pytest.raises(ValueError, match=r"holds a state of Hedgehog.*DecayLinear"):
        other(tokens[:, :1], past_key_values=cache)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    with pytest.raises(ValueError, match=r"shows \[8, 12\].*taken in \[12, 12\]"):
        model(tokens[:, :1], attention_mask=mask, past_key_values=cache)


def test_static_cache_by_hand(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), attention=sa.DecayLinear(), layers=[1])
    with torch.no_grad():
        want = model(tokens).logits
        cache = StaticCache(config=model.config, max_cache_len=20)
        first = model(tokens[:, :5], past_key_values=cache).logits
        rest = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(5, 12)]
    close(torch.cat([first, *rest], 1), want, 2e-5)
    assert isinstance(cache.layers[1], StateLayer)
    assert cache.layers[1].get_max_length() == 20


def test_layers_with_a_window_are_refused() -> None:
    model = make_model("mistral")
    with pytest.raises(ValueError, match=r"window of 8 keys.*elu_linear"):
        sh.patch(model, attention=sa.EluLinear())
    model = make_model("gemma2")
    sh.patch(model, attention=sa.EluLinear(), layers=[1])  # the global one
    tokens = torch.arange(3, 30)[None]
    want = model.generate(tokens, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(tokens, **GREEDY), want)


def test_maps_and_diagnostics(tokens: Tensor) -> None:
    model = patched("llama", sa.EluLinear())
    maps = model(tokens, output_attentions=True, use_cache=False).attentions
    assert [m.shape for m in maps] == [(2, 4, 12, 12)] * 2
    for weights in maps:
        close(weights.sum(-1), torch.ones(2, 4, 12), 1e-5)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens, output_attentions=True, use_cache=True)
    assert sh.diagnose(model, tokens).variants == ["elu_linear"] * 2


def test_describe_names_the_form() -> None:
    model = patched("llama", sa.Hedgehog(features=4))
    assert "chunks and a state" in str(sh.describe(model))
    train = patched("llama", sa.Hedgehog(features=4), attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="attention dropout"):
        train(torch.randint(3, VOCAB, (1, 5)))


def test_encoder_decoders_and_mixtures(tokens: Tensor) -> None:
    """A decoder's self-attention keeps its state in its own cache; a mixture with the softmax keeps keys and values."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    widths = {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    tied = {"decoder_start_token_id": 2, "forced_eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model("bart", **sizes, **heads, **widths, **tied)
    bart = AutoModelForSeq2SeqLM.from_config(config).eval()
    mixed = sa.Mixed(other=sa.Hedgehog(features=4), start=0.5)
    for model in (
        sh.patch(bart, attention=sa.EluLinear()),
        sh.patch(make_model("llama"), attention=mixed),
    ):
        for beams in (1, 2):
            want = model.generate(tokens, use_cache=False, num_beams=beams, **GREEDY)
            assert torch.equal(model.generate(tokens, num_beams=beams, **GREEDY), want)


def test_a_window_may_be_wider_than_a_static_cache(tokens: Tensor) -> None:
    model = sh.patch(make_model("llama"), attention=sa.LoLCATs(window=64, features=4))
    want = model.generate(tokens, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **GREEDY), want)
