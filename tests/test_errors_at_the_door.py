"""Errors at the door: one line that says what was asked, what was seen and what would work, before anything changed."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

import hf_softheads as sh
from hf_softheads.cli import main
from hf_softheads.plan import dense_head
from hf_softheads.pretrained import find
from hf_softheads.registry import Bounds, Spec, spec_from_dict, variants

from .conftest import SIZES, VOCAB, make_model

EVERY = [
    cls for kind in ("head", "classifier", "attention", "loss") for cls in variants(kind).values()
]


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 400
    return text


# -- fields of specs ---------------------------------------------------------------------------------------------------


def fields(cls: type[Spec], of: type) -> list[str]:
    """Fields whose value is a number of a type, optional or not."""
    hints = typing.get_type_hints(cls)  # without the bounds
    names = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    return [name for name in names if of in (hints[name], *_options(hints[name]))]


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else ()


def example(cls: type[Spec], **given: Any) -> Spec:
    """A spec of a class, with something in every field that has no default."""
    values = {"tuple": (4,), "int": 4, "float": 4.0, "HeadSpec": sh.heads.Dense()}
    hints = typing.get_type_hints(cls)
    required = {
        name: values[hints[name].__name__]
        for name, field in cls.__dataclass_fields__.items()  # type: ignore[attr-defined]
        if field.default is field.default_factory
    }
    if cls is sh.losses.SemanticSoftmax:
        required["levels"] = ((0, 0, 1),)
    return cls(**{**required, **given})


FLOATS = [(cls, name) for cls in EVERY for name in fields(cls, float)]
INTEGERS = [(cls, name) for cls in EVERY for name in fields(cls, int)]


def test_there_are_fields_to_try():
    assert len(FLOATS) > 30
    assert len(INTEGERS) > 40
    assert all(example(cls) for cls in EVERY)


@pytest.mark.parametrize(("cls", "name"), FLOATS, ids=lambda v: getattr(v, "__name__", v))
def test_every_float_is_a_finite_number(cls, name):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^{cls.name}\.{name} must be finite, got {value}$"):
            example(cls, **{name: value})
    for wrong in ("x", True, [1.0]):
        with pytest.raises(ValueError, match=rf"^{cls.name}\.{name} must be float.*, got "):
            example(cls, **{name: wrong})


@pytest.mark.parametrize(("cls", "name"), INTEGERS, ids=lambda v: getattr(v, "__name__", v))
def test_every_integer_is_one_and_not_negative(cls, name):
    for wrong in ("x", 2.5, 2.0, True, math.nan):
        with pytest.raises(ValueError, match=rf"^{cls.name}\.{name} must be int.*, got "):
            example(cls, **{name: wrong})
    with pytest.raises(ValueError, match=rf"^{cls.name}\.{name} must be .*, got -1$"):
        example(cls, **{name: -1})


BAD = [
    ("head", "vq", "codes", "many", "must be int, got 'many'"),
    ("head", "quantized", "bits", 7, "must be one of 2, 3, 4, 5, 6, 8, got 7"),
    ("head", "quantized", "group", "x", "must be int | 'auto' | None, got 'x'"),
    ("attention", "softpick", "eps", "x", "must be float, got 'x'"),
    ("attention", "softpick", "eps", -1, "must be positive, got -1"),
    ("attention", "softpick", "eps", math.nan, "must be finite, got nan"),
    ("attention", "sigmoid", "bias", math.inf, "must be finite, got inf"),
    ("attention", "log_n", "length", 1, "must be at least 2 (log 1 is 0), got 1"),
    ("attention", "selective", "token", "yes", "must be bool, got 'yes'"),
]


@pytest.mark.parametrize(("kind", "name", "field", "value", "reason"), BAD)
def test_the_text_is_the_same_in_python_json_and_on_the_command_line(
    kind, name, field, value, reason, capsys, tmp_path
):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}.{field} {reason}')}$"):
        example(variants(kind)[name], **{field: value})
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}.{field} {reason}')}$"):
        spec_from_dict(
            kind,
            {"name": name, "codes": 4, field: value}
            if name == "vq"
            else {"name": name, field: value},
        )
    written = {math.nan: "NaN", math.inf: "Infinity"}.get(value, value)
    command = ["patch", "embedded", f"--{kind}", name, "--set", f"{kind}.{field}={written}"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"softheads patch: {name}.{field} {reason}\n"
    assert list(tmp_path.iterdir()) == []


def test_values_take_the_type_of_their_field():
    sigmoid = sh.attention.Sigmoid(bias=1)
    assert type(sigmoid.bias) is float
    vq = sh.heads.VQ(codes=np.int64(7))
    assert type(vq.codes) is int
    assert sh.heads.Adaptive([3, 5]).cutoffs == (3, 5)
    assert (
        sh.heads.LowRank(2, "dense")
        == sh.heads.LowRank(2, {"name": "dense"})
        == sh.heads.LowRank(2)
    )
    with pytest.raises(ValueError, match=r"adaptive_temperature\.polynomial\[1\] must be finite"):
        sh.attention.AdaptiveTemperature(polynomial=(1.0, math.nan))


def test_a_variant_s_own_check_does_not_replace_that_of_its_fields():
    @dataclass(frozen=True)
    class Parent(Spec):
        size: Annotated[int, Bounds(at_least=2, at_most=4)] = 2

        def __post_init__(self) -> None:
            if self.size == 3:
                raise ValueError("not 3")

    @dataclass(frozen=True)
    class Child(Parent):
        mode: Literal["a", "b"] = "a"

        def __post_init__(self) -> None:
            pass

    with pytest.raises(ValueError, match="not 3"):
        Parent(3)
    assert Child(3).size == 3
    for cls in (Parent, Child):
        with pytest.raises(ValueError, match=rf"{cls.__name__}\.size must be from 2 to 4, got 5"):
            cls(5)
    with pytest.raises(ValueError, match=r"Child\.mode must be one of 'a', 'b', got 'c'"):
        Child(2, "c")


# -- models and tokens -------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return make_model("llama")


def hooks(model: Any) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@contextlib.contextmanager
def refused(model: Any, error: type[Exception], message: str) -> Iterator[None]:
    """Within, an error of this type whose one line matches the message is raised, and the model stays as it is."""
    state, kind, mode = copy.deepcopy(model.state_dict()), type(model), model.training
    settings, hooked = copy.deepcopy(model.config.to_dict()), hooks(model)
    with pytest.raises(error, match=message) as caught:
        yield
    assert caught.type is error
    one_line(caught.value)
    assert type(model) is kind
    assert model.training is mode
    assert model.config.to_dict() == settings
    assert hooks(model) == hooked
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


IDS = torch.randint(3, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
KL = {sh.losses.KL(): 1.0}
DOORS: dict[str, Callable[[Any], Any]] = {
    "patch": lambda m: sh.patch(m, head="dense"),
    "unpatch": sh.unpatch,
    "describe": sh.describe,
    "export": lambda m: sh.export(m, "nowhere/out"),
    "collect": lambda m: sh.collect(m, IDS),
    "evaluate": lambda m: sh.evaluate(m, IDS),
    "reference": lambda m: sh.evaluate(make_model("llama"), IDS, reference=7 if m is None else m),
    "diagnose": lambda m: sh.diagnose(m, IDS),
    "choose": lambda m: sh.choose(m, sh.collect(make_model("llama"), IDS), bits=4),
    "repair_head": lambda m: sh.repair_head(m, torch.zeros(VOCAB, 32), IDS),
    "Objective": lambda m: sh.Objective(m, {sh.losses.CrossEntropy(): 1.0}),
    "teacher": lambda m: sh.Objective(make_model("llama"), KL, teacher=7 if m is None else m),
    "dense_head": dense_head,
}


class Pipeline:
    """As transformers' pipelines, it holds its model in `.model`."""

    def __init__(self) -> None:
        self.model = make_model("llama")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "given", ["a string", None, Pipeline(), [1.0]], ids=lambda v: type(v).__name__
)
def test_what_is_no_model_is_refused_by_name(door, given):
    if door == "teacher":
        expected = r"a teacher is a matrix .*, got (str|int|Pipeline|list)$"
    else:
        expected = r"expected a (loaded )?transformers model, got "
    with pytest.raises(TypeError, match=expected) as caught:
        DOORS[door](given)
    one_line(caught.value)


def test_a_matrix_is_no_model():
    for door in DOORS.keys() - {"teacher"}:
        with pytest.raises(TypeError, match="expected a transformers model, got Tensor"):
            DOORS[door](torch.zeros(3, 2))


def test_a_pipeline_s_model_is_pointed_at():
    with pytest.raises(
        TypeError, match=r"got Pipeline; give the model inside it: its attribute \.model"
    ):
        sh.describe(Pipeline())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": sh.heads.VQ}, r"got the class VQ; give an instance: VQ\(codes=…\)"),
        ({"head": sh.heads.Dense}, r"got the class Dense; give an instance: Dense\(\)"),
        ({"attention": sh.attention.SSMax}, r"got the class SSMax; give an instance: SSMax\(\)"),
        ({"attention": {0: sh.attention.SSMax}}, r"got the class SSMax; give an instance"),
    ],
)
def test_a_class_instead_of_an_instance(model, arguments, message):
    with refused(model, ValueError, message):
        sh.patch(model, **arguments)


def test_a_class_as_a_loss_or_inside_a_variant(model):
    with refused(model, ValueError, r"give an instance: KL\(\)"):
        sh.Objective(model, {sh.losses.KL: 1.0}, teacher=torch.zeros(VOCAB, 32))
    with pytest.raises(ValueError, match=r"give an instance: Quantized\(\)"):
        sh.heads.LowRank(2, sh.heads.Quantized)


TEXTS: dict[str, Callable[[Any, Any], Any]] = {
    "collect": lambda m, data: sh.collect(m, data, window=12),
    "evaluate": lambda m, data: sh.evaluate(m, data, window=12),
    "repair_head": lambda m, data: sh.repair_head(m, torch.zeros(VOCAB, 32), data, steps=1),
    "diagnose": lambda m, data: sh.diagnose(m, data),
}
BAD_TOKENS = [
    (
        torch.full((2, 12), VOCAB),
        f"from {VOCAB} to {VOCAB} were given, but LlamaForCausalLM knows 0 to 95",
    ),
    (torch.full((2, 12), -1), "from -1 to -1 were given, but LlamaForCausalLM knows 0 to 95"),
    (torch.zeros(2, 12), r"whole numbers, got a tensor of torch\.float32"),
    (torch.zeros(0, 12, dtype=torch.long), r"\(0, 12\)"),
]


@pytest.mark.parametrize("door", TEXTS)
@pytest.mark.parametrize(
    ("data", "message"), BAD_TOKENS, ids=["large", "negative", "float", "empty"]
)
def test_tokens_that_are_none(model, door, data, message):
    with refused(model, ValueError, message):
        TEXTS[door](model, data)


@pytest.mark.parametrize("door", ["collect", "evaluate", "diagnose"])
def test_a_dictionary_without_tokens(model, door):
    with refused(model, ValueError, r"input_ids.* got the keys \['a'\]"):
        TEXTS[door](model, {"a": 1})


@pytest.mark.parametrize("door", ["collect", "evaluate"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": "text"}, "token ids are a tensor of whole numbers, got str"),
        (
            {"input_ids": IDS[0]},
            r"input_ids \(B, T\) and others of the same shape, got input_ids \(12,\)",
        ),
        ({"input_ids": IDS, "labels": IDS[:2]}, r"labels \(2, 12\)"),
        ({"input_ids": IDS, "labels": IDS + VOCAB}, "labels from .* were given, but"),
    ],
)
def test_a_batch_of_the_wrong_shape(model, door, batch, message):
    with refused(model, ValueError, message):
        TEXTS[door](model, batch)


@pytest.mark.parametrize("door", ["collect", "evaluate"])
@pytest.mark.parametrize("data", [None, 3])
def test_what_is_no_text(model, door, data):
    with refused(model, ValueError, f"expected text, a path, .* got {type(data).__name__}"):
        TEXTS[door](model, data)


def test_what_are_no_statistics(model):
    with refused(model, TypeError, r"stats are what sh\.collect\(model, text\) returns, got str"):
        sh.patch(model, head=sh.heads.VQ(codes=24), stats="text")
    with refused(model, TypeError, "stats are what .* got NoneType"):
        sh.choose(model, None, bits=4)


@pytest.mark.parametrize(
    ("attention", "layers", "message"),
    [
        ({}, None, r"attention=\{\} selects no layer"),
        ({0.5: "softmax"}, None, "a layer is an integer, got 0.5"),
        ("softmax", [0.5], "a layer is an integer, got 0.5"),
        ("softmax", 1, "layers is a list of layer indices, got 1"),
    ],
)
def test_layers_that_are_none(model, attention, layers, message):
    with refused(model, ValueError, message):
        sh.patch(model, attention=attention, layers=layers)


@pytest.mark.parametrize("losses", ["kl", ["kl"], {"cross_entropy": "1"}])
def test_losses_without_weights(model, losses):
    with refused(model, ValueError, "losses are a dictionary|must be a number, got '1'"):
        sh.Objective(model, losses)


def test_text_where_windows_are_wanted(model):
    sh.patch(model, head=sh.heads.VQ(codes=24))
    for rows in ("text", [IDS], None, (IDS,)):
        with refused(model, ValueError, "repair needs token windows .* as a tensor, got"):
            sh.repair_head(model, dense_head(model), rows, steps=1)
    with pytest.raises(ValueError, match=r"diagnose reads a tensor of token ids .* got str"):
        sh.diagnose(model, "text")


# -- repairs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", [sh.heads.VQ(codes=24), sh.heads.ProductVQ(8, 16), sh.heads.LowRank(4)]
)
def test_a_repair_that_ends_above_its_start_puts_the_head_back(model, spec):
    sh.patch(model, head=spec)
    with refused(
        model, ValueError, "made the head worse: .* was .* before and is .* the head was put back"
    ):
        sh.repair_head(model, dense_head(model), IDS, steps=4, batch_size=32, lr=100.0, code_lr=0.0)
    before = model.lm_head.weight.clone()
    sh.repair_head(model, dense_head(model), IDS, steps=4, batch_size=32)
    assert not torch.equal(model.lm_head.weight, before)  # and can be repaired still


# -- what is no language model -----------------------------------------------------------------------------------------

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_TEXT = {**SIZES, "head_dim": 8}
_IMAGE = 5  # the token that stands for a patch of an image
CLIP = {
    "text_config": {**_VISION, "vocab_size": VOCAB, "max_position_embeddings": 32},
    "vision_config": _VISION,
    "projection_dim": 16,
}
MULTIMODAL = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_VISION},
        "text_config": {"model_type": "llama", **_TEXT},
        "image_token_index": _IMAGE,
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "text_config": {**_TEXT, "sliding_window": 8},
        "mm_tokens_per_image": 4,
        "image_token_id": _IMAGE,
    },
}


@pytest.mark.parametrize("family", MULTIMODAL)
def test_only_the_language_model_of_a_multi_modal_one_is_patched(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MULTIMODAL[family])
    model = AutoModelForImageTextToText.from_config(config).eval()
    ids = IDS[:1].clone()
    ids[:, 2:6] = _IMAGE  # 16 × 16 pixels in patches of 8
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    if family == "gemma3":
        batch["token_type_ids"] = (ids == _IMAGE).long()
    before = model(**batch).logits
    sh.patch(model, attention="softmax")
    patched = [name for name, module in model.named_modules() if hasattr(module, "softheads")]
    assert patched == [f"model.language_model.layers.{i}.self_attn" for i in (0, 1)]
    torch.testing.assert_close(model(**batch).logits, before, atol=1e-5, rtol=1e-5)
    sh.unpatch(model)
    with refused(model, ValueError, "layer 2 does not exist: the model has layers 0 to 1"):
        sh.patch(model, attention="softmax", layers=[2])


@pytest.mark.parametrize(
    ("family", "settings", "reads"),
    [
        ("vit", _VISION, "reads image and"),
        (
            "clip",
            CLIP,
            "reads image and text and is no language model; .* in its text tower alone",
        ),
    ],
)
def test_towers_are_no_language_models(family, settings, reads):
    model = AutoModel.from_config(AutoConfig.for_model(family, **settings)).eval()
    with refused(model, ValueError, reads):
        sh.patch(model, attention="softmax")
    with refused(model, ValueError, "no output embedding"):
        sh.patch(model, head="dense")


def test_a_module_of_another_library_is_no_model():
    class UNet2DConditionModel(torch.nn.Module):
        pass

    with pytest.raises(TypeError, match="expected a transformers model, got UNet2DConditionModel"):
        sh.patch(UNet2DConditionModel(), attention="softmax")


T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCAB}
OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "t5": (AutoModelForSeq2SeqLM, T5, "AutoModelForSeq2SeqLM"),
    "bert": (AutoModelForMaskedLM, SIZES, "AutoModelForMaskedLM"),
    "llama": (AutoModelForCausalLM, _TEXT, "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("family", OTHERS)
def test_the_folder_of_a_model_says_what_loads_it(family, tmp_path):
    auto, settings, loader = OTHERS[family]
    model = auto.from_config(AutoConfig.for_model(family, **settings))
    model.save_pretrained(tmp_path)
    for door in (
        lambda: sh.patch(str(tmp_path), attention="softmax"),
        lambda: sh.export(tmp_path, tmp_path / "out"),
    ):
        with pytest.raises(TypeError, match="expected a loaded transformers model") as caught:
            door()
        text = one_line(caught.value)
        wanted = (
            f"{type(model).__name__}; load it first: {loader}.from_pretrained({str(tmp_path)!r})"
        )
        assert text.endswith(wanted)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"config.json": {"model_type": "clip", "architectures": ["CLIPModel"]}}, "CLIPModel"),
        (
            {"model_index.json": {"_class_name": "StableDiffusionPipeline"}},
            "StableDiffusionPipeline of diffusers",
        ),
        (
            {"config.json": {"_class_name": "UNet2DConditionModel"}},
            "UNet2DConditionModel of diffusers",
        ),
        ({"config.json": [1]}, "no config.json of a model"),
        ({}, "no config.json of a model"),
    ],
)
def test_the_folder_of_no_language_model_says_so(files, what, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for door in (lambda: sh.patch(tmp_path, attention="softmax"), lambda: sh.export(tmp_path, "o")):
        with pytest.raises(TypeError, match=f"which holds {what} and no language model$") as caught:
            door()
        one_line(caught.value)


@pytest.mark.parametrize(
    ("family", "auto", "settings", "message"),
    [
        ("t5", AutoModel, T5, "load it with AutoModelForSeq2SeqLM, or patch only its attention"),
        ("bert", AutoModel, SIZES, "load it with AutoModelForMaskedLM, or patch only its att"),
        ("llama", AutoModel, _TEXT, "load it with AutoModelForCausalLM, or patch only its att"),
        ("clip", AutoModel, CLIP, "clip is no family of language models"),
    ],
)
def test_a_model_without_an_lm_head_says_what_has_one(family, auto, settings, message):
    model = auto.from_config(AutoConfig.for_model(family, **settings)).eval()
    with refused(model, ValueError, f"has no output embedding, .*; {message}"):
        sh.patch(model, head="dense")
    with refused(model, ValueError, f"has no output embedding.*{message.partition(',')[0]}"):
        sh.Objective(model, {sh.losses.CrossEntropy(): 1.0})


@pytest.mark.parametrize("family", ["t5", "clip"])
def test_loading_by_name_refuses_in_one_line(family, tmp_path):
    auto, settings = (AutoModelForSeq2SeqLM, T5) if family == "t5" else (AutoModel, CLIP)
    auto.from_config(AutoConfig.for_model(family, **settings)).save_pretrained(tmp_path)
    what = "an encoder-decoder" if family == "t5" else "no language model"
    with pytest.raises(ValueError, match=rf"\({family}\) is {what}; decoder-only") as caught:
        find(str(tmp_path))
    one_line(caught.value)


def test_t5_s_own_attention_is_replaced_but_not_that_to_its_encoder():
    sizes = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0, pad_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    batch = {"input_ids": IDS[:2], "decoder_input_ids": IDS[2:4, :5]}
    before = model(**batch).logits
    sh.patch(model, attention="softmax")
    patched = [name for name, module in model.named_modules() if hasattr(module, "softheads")]
    assert len(patched) == 4
    assert all(name.endswith(".SelfAttention") for name in patched)
    torch.testing.assert_close(model(**batch).logits, before, atol=1e-5, rtol=1e-5)
    sh.patch(sh.unpatch(model), attention=sh.attention.Sigmoid())
    assert not torch.allclose(model(**batch).logits, before)


# -- damaged folders ---------------------------------------------------------------------------------------------------


def saved(folder: Path, **parts: Any) -> dict[str, Any]:
    """A patched model in a folder; what its config.json says."""
    sh.patch(make_model("llama"), **(parts or {"head": sh.heads.VQ(codes=24)})).save_pretrained(
        folder
    )
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def loading(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    one_line(caught.value)


@pytest.mark.parametrize("version", ["1", None, 0, True, -1, 1.0])
def test_a_damaged_format_version(version, tmp_path):
    config = saved(tmp_path)
    config["quantization_config"]["format_version"] = version
    (tmp_path / "config.json").write_text(json.dumps(config))
    loading(
        tmp_path,
        rf"format_version {re.escape(repr(version))}, but a format is a whole number from 1 to 1",
    )


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            None,
            "this model's plan names none of head, attention, tie; its config.json is damaged",
        ),
        ({"name": "vqq"}, "unknown head variant 'vqq'; did you mean 'vq'"),
        ({"name": "vq", "codes": "24"}, "vq.codes must be int, got '24'"),
        ({"name": "vq", "codes": -24}, "vq.codes must be at least 1, got -24"),
        ({"name": "vq"}, "needs a value for 'codes'"),
        (7, "a head variant is a dictionary with a 'name', got 7"),
    ],
)
def test_a_damaged_plan(head, message, tmp_path):
    config = saved(tmp_path)
    config["quantization_config"]["head"] = head
    (tmp_path / "config.json").write_text(json.dumps(config))
    loading(tmp_path, message)


def test_damaged_json(tmp_path):
    saved(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [4, 64, -100])
def test_a_truncated_file(length, tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    loading(tmp_path, r"model\.safetensors is truncated or damaged .*; download or export it again")


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ({"head": sh.heads.VQ(codes=24)}, "lm_head.codes"),
        ({"head": sh.heads.Quantized(bits=4)}, "lm_head.codes4"),
        ({"head": sh.heads.Temperature(inner=sh.heads.VQ(codes=24))}, "lm_head.inner.weight"),
        ({"attention": "ssmax"}, "model.layers.1.self_attn.softheads.s"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_tensor_that_is_missing(parts, name, tmp_path):
    """It would be left at random, codes as whatever was in memory."""
    saved(tmp_path, **parts)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loading(tmp_path, rf"{tmp_path} does not hold {re.escape(name)}, which the plan")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (sh.heads.VQ(codes=24), "codes"),
        (sh.heads.ResidualVQ(stages=2, codes=24), "codes"),
        (sh.heads.Hierarchical(8), "codes"),
        (sh.heads.Draft(40), "ids"),
        (sh.heads.Temperature(inner=sh.heads.VQ(codes=24)), "inner.codes"),
        (sh.heads.TransformCoded(bits=6.0), "bits"),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_indices_of_nothing(spec, name, tmp_path):
    stats = collected() if spec.name == "draft" else None
    model = make_model("llama")
    expected = (
        contextlib.nullcontext() if stats is None else pytest.warns(UserWarning, match="they need")
    )
    with expected:
        sh.patch(model, head=spec, stats=stats)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"lm_head.{name}"].view(-1)[3] = 97
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loading(
        tmp_path,
        rf"{re.escape(name)} of the .* holds indices from \d+ to 97, but there are 0 to \d+: the checkpoint",
    )


# -- before minutes are spent ------------------------------------------------------------------------------------------


def collected() -> Any:
    return sh.collect(make_model("llama"), IDS, window=12)


def test_a_head_that_the_checkpoint_lacks(tmp_path):
    make_model("llama").model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with refused(
        model, ValueError, r"lm_head\.weight was not in the checkpoint .* made it up at random"
    ):
        sh.patch(model, head=sh.heads.VQ(codes=24))
    sh.patch(model, attention="softmax")
    with pytest.raises(ValueError, match=f"not in the checkpoint {tmp_path}, so"):
        sh.patch(model, head=sh.heads.VQ(codes=24))


def test_a_head_that_a_pickled_checkpoint_lacks(tmp_path):
    made = make_model("llama")
    made.config.save_pretrained(tmp_path)
    torch.save(made.state_dict(), tmp_path / "pytorch_model.bin")
    sh.patch(AutoModelForCausalLM.from_pretrained(tmp_path), head="dense")
    torch.save(made.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lm_head\.weight was not in the checkpoint"):
        sh.patch(AutoModelForCausalLM.from_pretrained(tmp_path), head="dense")


def test_a_head_of_which_the_checkpoint_lacks_the_bias(tmp_path):
    config = AutoConfig.for_model("bert", **SIZES)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with refused(model, ValueError, r"decoder\.bias was not in the checkpoint"):
        sh.patch(model, head="dense")
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "whole")
    sh.patch(AutoModelForMaskedLM.from_pretrained(tmp_path / "whole"), head="dense")


def test_a_random_head_is_refused_when_patching_while_loading(tmp_path):
    make_model("llama").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made it up at random"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=sh.SoftheadsConfig(head="dense")
        )


@pytest.mark.parametrize("shards", ["50GB", "8KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_heads_that_were_loaded_resized_or_made_here_are_patched(tied, shards, tmp_path):
    made = make_model("llama", tie_word_embeddings=tied)
    made.save_pretrained(tmp_path, max_shard_size=shards)
    sh.patch(AutoModelForCausalLM.from_pretrained(tmp_path), head="dense")
    resized = AutoModelForCausalLM.from_pretrained(tmp_path)
    resized.resize_token_embeddings(VOCAB + 3)
    sh.patch(resized, head="dense")
    sh.patch(copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path)), head="dense")
    sh.patch(made, head="dense")


def test_statistics_that_are_not_finite(model):
    stats = collected()
    stats.curvature[3] = math.nan
    with refused(model, ValueError, "these statistics hold NaN or infinite values in curvature"):
        sh.patch(model, head=sh.heads.VQ(codes=24), stats=stats)


def test_a_warning_points_to_the_line_that_asked(model):
    stats = collected()
    with pytest.warns(UserWarning, match=r"saw 88 tokens; .* they need about 512") as patching:
        sh.patch(model, head="dense", stats=stats)
    with pytest.warns(UserWarning, match=r"saw 88 tokens; .* they need about 8,192") as choosing:
        sh.choose(make_model("llama"), stats, bits=8, candidates=[sh.heads.Quantized(4)])
    assert {warning.filename for warning in [*patching, *choosing]} == {__file__}


# -- saving ------------------------------------------------------------------------------------------------------------


def test_saving_replaces_nothing_before_all_is_written(model, tmp_path, monkeypatch):
    saved(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sh.patch(model, head=sh.heads.Quantized(4))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patching:
        patching.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_saving_in_fewer_shards_leaves_none_of_before(model, tmp_path):
    sh.patch(model, head=sh.heads.VQ(codes=24))
    (tmp_path / "other-00001-of-00002.safetensors").write_text("mine")
    for size in ("8KB", "16KB", "50GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {"model.safetensors", "other-00001-of-00002.safetensors"}


def test_other_processes_and_given_weights(model, tmp_path):
    sh.patch(model, head=sh.heads.VQ(codes=24))
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.safetensors"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"].zero_()
    model.save_pretrained(tmp_path, state_dict=state)
    assert not load_file(tmp_path / "model.safetensors")["lm_head.weight"].any()
