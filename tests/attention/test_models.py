"""Variants inside models: families, masks, caches, checkpointing, compilation, files."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_softheads as sh
from hf_softheads import bridge
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows
from tests.attention.samples import SPECS, label
from tests.conftest import VOCAB, make_model

sa = sh.attention
KINDS: list[
    AttentionSpec
] = [  # a row map, a scaled query, an identity, a position bias in a window, the layer's input
    sa.Softpick(),
    sa.SSMax(bias=True),
    sa.LearnedSink(start=0.0),
    sa.SWAT(window=6),
    sa.Gated(start=0.5),
]
every_kind = pytest.mark.parametrize("spec", KINDS, ids=label)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": VOCAB + 1, "pad_token_id": 0}


def patched(family: str, spec: Any, **changes: Any) -> Any:
    model = sh.patch(make_model(family, **changes), attention=spec)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if ".softheads." in name:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def left_pad(tokens: Tensor, by: int) -> dict[str, Tensor]:
    padding = torch.zeros(len(tokens), by, dtype=torch.long)
    ids = torch.cat([padding, tokens], 1)
    mask = torch.cat([padding, torch.ones_like(tokens)], 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def close(got: Tensor, want: Tensor, atol: float = 3e-4) -> None:
    assert got.isfinite().all()
    assert (got - want).abs().max() <= atol * max(1.0, float(want.abs().max().detach()))


@every_kind
def test_families(family: str, spec: AttentionSpec, tokens: Tensor) -> None:
    """Causal, right under left padding, and the same token by token over a cache."""
    model = patched(family, spec)
    with torch.no_grad():
        whole = model(tokens).logits
        spoiled = tokens.clone()
        spoiled[:, 8:] = 5
        close(model(spoiled).logits[:, :8], whole[:, :8], 1e-5)
        if family != "opt":  # opt computes its positions from the mask and refuses others
            close(model(**left_pad(tokens, 5)).logits[:, 5:], whole)
        cache, steps = None, []
        for t in range(tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_control_equals_eager_with_soft_caps_and_windows(family: str) -> None:
    """With scores so large, and text so long, that the soft cap and the window change the logits."""
    tokens = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    changes = {"attn_logit_softcapping": 0.5} if family == "gemma2" else {}

    def sharp(**changes: Any) -> Any:
        made = make_model(family, **changes)
        made.set_attn_implementation("eager")
        with torch.no_grad():
            for name, p in made.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    p.mul_(30)  # initialised near 0, all scores are
        return made

    model = sharp(**changes)
    with torch.no_grad():
        want = model(tokens).logits
        for without in (dict.fromkeys(changes), {**changes, "sliding_window": 64}):
            if without != changes:
                assert (sharp(**without)(tokens).logits - want).abs().max() > 0.1
        for layers in (None, [0], [1]):  # one local, one global
            sh.patch(model, attention=sa.Softmax(), layers=layers)
            close(model(tokens).logits, want, 1e-5)
            sh.unpatch(model)
            assert torch.equal(model(tokens).logits, want)


def test_windows_are_those_of_the_layer() -> None:
    """mistral sees 8 keys in every layer: with two layers, 14 tokens back nothing is felt, whatever the row map."""
    model = patched("mistral", sa.Sigmoid(bias=-2.0))
    tokens = torch.randint(3, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[:, 0] = (tokens[:, 0] + 1) % VOCAB
    with torch.no_grad():
        got, want = model(other).logits, model(tokens).logits
    close(got[:, 15:], want[:, 15:], 1e-6)
    assert (got[:, 14] - want[:, 14]).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("spec", [KINDS[0], KINDS[3], KINDS[4]], ids=label)
def test_caches(family: str, spec: AttentionSpec, tokens: Tensor) -> None:
    """Greedy decoding, left-padded, with every cache, equals decoding that keeps no cache."""
    model = patched(family, spec)
    inputs = left_pad(tokens, 3)
    inputs.pop("position_ids")
    want = model.generate(**inputs, use_cache=False, **GREEDY)
    for cache in ("dynamic", "static"):
        got = model.generate(**inputs, cache_implementation=cache, **GREEDY)
        assert torch.equal(got, want), cache


def test_generation_modes(tokens: Tensor) -> None:
    model, assistant = (
        patched("llama", sa.Softpick()),
        patched("llama", sa.SSMax(bias=True), seed=1),
    )
    want = model.generate(tokens[:1], **GREEDY)
    assert torch.equal(model.generate(tokens[:1], assistant_model=assistant, **GREEDY), want)
    options = {**GREEDY, "num_beams": 3}
    beams = model.generate(tokens, **options)
    assert torch.equal(beams, model.generate(tokens, use_cache=False, **options))
    torch.manual_seed(0)
    sampled = model.generate(tokens, **{**GREEDY, "do_sample": True})
    torch.manual_seed(0)
    again = model.generate(tokens, use_cache=False, **{**GREEDY, "do_sample": True})
    assert torch.equal(sampled, again)


@every_kind
def test_packed_sequences(spec: AttentionSpec, tokens: Tensor) -> None:
    model = patched("llama", spec)
    row, part = tokens[:1], 5
    positions = torch.cat([torch.arange(part), torch.arange(row.shape[1] - part)])[None]
    with torch.no_grad():
        got = model(row, position_ids=positions, use_cache=False).logits
        close(got[:, :part], model(row[:, :part]).logits)
        close(got[:, part:], model(row[:, part:]).logits)


@every_kind
def test_gradient_checkpointing(spec: AttentionSpec, tokens: Tensor) -> None:
    def grads(checkpointing: bool) -> dict[str, Tensor]:
        model = patched("llama", spec).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name from v6 on
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model(tokens, labels=tokens).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = grads(False), grads(True)
    assert plain.keys() == checkpointed.keys()
    assert any(".softheads." in name for name in plain) == bool(spec.init_params(GEOMETRY))
    for name, want in plain.items():
        close(checkpointed[name], want, 1e-5)


GEOMETRY = sh.attention.base.Geometry(heads=4, kv_heads=2, head_dim=8, hidden_size=32)


@pytest.mark.slow
@every_kind
def test_compiles_in_one_graph(spec: AttentionSpec, tokens: Tensor) -> None:
    model = patched("llama", spec, num_hidden_layers=1)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        close(compiled(tokens, use_cache=False).logits, want, 1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", [s for s in SPECS if s == type(s)()], ids=label)
def test_saves_and_loads(spec: AttentionSpec, tokens: Tensor, tmp_path: Any) -> None:
    model = patched("llama", spec)
    want = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, want)


def test_layers_and_their_variants(tokens: Tensor, tmp_path: Any) -> None:
    model = make_model("llama", num_hidden_layers=4)
    before = model(tokens).logits
    sh.patch(model, attention={0: sa.Softpick(), 2: sa.Gated(), 3: "relu"})
    kinds = {n: m.softheads.spec.name for n, m in model.named_modules() if hasattr(m, "softheads")}
    assert list(kinds.values()) == ["softpick", "gated", "relu"]
    assert not hasattr(model.model.layers[1].self_attn, "softheads")
    want = model(tokens).logits
    assert (want - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, want)
    sh.unpatch(model)
    assert torch.equal(model(tokens).logits, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bfloat16_keeps_small_parameters_useful(tokens: Tensor) -> None:
    model = patched("llama", sa.Sigmoid(bias=-2.0)).to(torch.bfloat16)
    logits = model(tokens).logits
    assert logits.dtype == torch.bfloat16
    close(logits.float(), patched("llama", sa.Sigmoid(bias=-2.0))(tokens).logits, 0.05)


_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_encoders(family: str, tokens: Tensor) -> None:
    """No causality; padding on the right changes nothing."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **_SIZES)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        want = model(tokens, attention_mask=mask).last_hidden_state
        sh.patch(model, attention=sa.Softmax())
        close(model(tokens, attention_mask=mask).last_hidden_state, want, 1e-5)
        sh.unpatch(model)
        for spec in (sa.Softpick(), sa.SSMax(), sa.Sigmoid(alibi=True), sa.Gated(start=0.0)):
            sh.patch(model, attention=spec)
            alone = model(tokens[:, :9], attention_mask=mask[:, :9]).last_hidden_state
            short = mask.clone()
            short[:, 9:] = 0
            padded = model(tokens, attention_mask=short).last_hidden_state
            close(padded[:, :9], alone)
            changed = tokens.clone()
            changed[:, 8] = 7
            other = model(changed[:, :9], attention_mask=mask[:, :9]).last_hidden_state
            assert (other[:, 0] - alone[:, 0]).abs().max() > 1e-6, "a later token is not seen"
            sh.unpatch(model)


def _gpt_oss() -> Any:
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    config = AutoConfig.for_model("gpt_oss", **_SIZES, **sizes, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, p in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(p)
    return model


def test_sinks_are_refused_or_adopted(tokens: Tensor) -> None:
    model = _gpt_oss()
    with torch.no_grad():
        want = model(tokens).logits
        with pytest.raises(
            NotImplementedError, match=r"learned attention sinks.*softpick.*learned_sink"
        ):
            sh.patch(model, attention=sa.Softpick())
        assert torch.equal(model(tokens).logits, want)
        for layers in ([0], None):
            sh.patch(model, attention=sa.LearnedSink(), layers=layers)
            close(model(tokens).logits, want, 1e-5)
            sh.unpatch(model)
        assert sh.diagnose(model, tokens).variants == ["learned_sink"] * 2


def test_wrong_layers_are_refused(tokens: Tensor) -> None:
    model = make_model("llama")
    before = model(tokens).logits
    for layers in ([2], [-3], [], [0, 7]):
        with pytest.raises(ValueError, match="layer"):
            sh.patch(model, attention=sa.Softpick(), layers=layers)
    with pytest.raises(ValueError, match="layer"):
        sh.patch(model, attention={5: sa.Softpick()})
    with pytest.raises(ValueError, match="did you mean 'softpick'"):
        sh.patch(model, attention="softpik")
    assert torch.equal(model(tokens).logits, before)


def test_unknown_geometry_is_refused() -> None:
    model = make_model("llama")
    silent = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=32))
    with pytest.raises(ValueError, match="number of heads"):
        bridge.geometry(model, 0, SimpleNamespace(config=silent))


HARMLESS = [
    sa.LogN(length=512),
    sa.SSMax(),
    sa.TopK(k=64),
    sa.LearnedSink(start=-10),
    sa.Mixed(),
    sa.Selective(),
    sa.Gated(),
]


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Tensor, float]:
    """The embedded model, 6 held-out windows of its training length, and its loss on them."""
    model, tokenizer = sh.embedded.load_embedded()
    few = itertools.islice(stdlib_documents("heldout"), 3)
    rows = windows(few, tokenizer, window=512).input_ids[:6]
    assert rows.shape == (6, 512)
    with torch.no_grad():
        return model, rows, float(model(rows, labels=rows).loss)


@pytest.mark.slow
@pytest.mark.parametrize("spec", HARMLESS, ids=label)
def test_training_free_variants_do_not_hurt(
    spec: AttentionSpec, embedded: tuple[Any, Tensor, float]
) -> None:
    """In every layer, at the training length, a pretrained model keeps its perplexity within 0.1 %."""
    model, rows, before = embedded
    with torch.no_grad():
        sh.patch(model, attention=spec)
        after = float(model(rows, labels=rows).loss)
    used = {m.softheads.spec for m in model.modules() if hasattr(m, "softheads")}
    sh.unpatch(model)
    assert used == {spec.for_pretrained()}
    assert all(s.training_free for s in used)
    assert abs(math.expm1(after - before)) <= 1e-3


def test_a_trained_model_gets_the_form_that_starts_as_the_softmax(tokens: Tensor) -> None:
    """What is left open is decided by `patch`, written into the plan, and can be decided by the caller."""
    model = make_model("llama")
    want = model(tokens).logits
    sh.patch(model, attention={0: sa.SSMax(), 1: sa.Mixed(other=sa.TopK(k=4), start=0.0)})
    plan = model.config.quantization_config.attention
    assert plan == {0: sa.SSMax(bias=True), 1: sa.Mixed(other=sa.TopK(k=4, rest="quadratic"))}
    close(model(tokens).logits, want, 1e-5)
    sh.unpatch(model)
    for spec in (sa.SSMax(bias=False), sa.TopK(k=4, rest="drop")):
        sh.patch(model, attention=spec)
        assert model.config.quantization_config.attention == spec
        assert (model(tokens).logits - want).abs().max() > 1e-3
        sh.unpatch(model)


@pytest.mark.parametrize(
    "spec", [sa.Softpick(), sa.SSMax(bias=True), sa.Mixed(start=0.5)], ids=label
)
def test_attention_maps_on_request(spec: AttentionSpec, tokens: Tensor) -> None:
    """`output_attentions=True` gives the weights that the output is made of, in the patched and in the other layers."""
    model = sh.patch(make_model("llama"), attention=spec, layers=[1])
    want = model(tokens).logits
    out = model(tokens, output_attentions=True)
    close(out.logits, want, 1e-5)
    assert [a.shape for a in out.attentions] == [(2, 4, 12, 12)] * 2
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)
    for weights in out.attentions:
        assert (weights[..., future] == 0).all()
    assert (out.attentions[0].sum(-1) - 1).abs().max() < 1e-5
    rows = torch.arange(100).remainder(90)[None] + 3
    model = make_model("llama", max_position_embeddings=128)
    model.set_attn_implementation("eager")
    maps = model(rows, output_attentions=True).attentions
    sh.patch(model, attention=sa.Softmax())
    close(model(rows, output_attentions=True).attentions[1], maps[1], 1e-5)


def test_attention_maps_of_every_family(family: str, tokens: Tensor) -> None:
    """Also where the family takes `output_attentions` for itself and tells its attention nothing (gpt2)."""
    model = make_model(family)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(tokens, output_attentions=True).attentions
        sh.patch(model, attention=sa.Softmax())
        got = model(tokens, output_attentions=True).attentions
        assert model(tokens).attentions is None
    assert len(got) == len(want) == 2
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs, 1e-5)


@pytest.mark.parametrize("spec", [KINDS[1], KINDS[2], KINDS[4]], ids=label)
def test_peft_trains_and_saves_the_variant(
    spec: AttentionSpec, tokens: Tensor, tmp_path: Any
) -> None:
    """LoRA beside a fully trained variant; the adapter brings the variant's parameters back."""
    model = patched("llama", spec)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["softheads"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    before = model(tokens).logits.detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(tokens, labels=tokens).loss.backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(".softheads." in name for name in moved)
    optimizer.step()
    want = model.eval()(tokens).logits.detach()
    assert (want - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    close(PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits, want, 1e-5)
