"""Errors at the door: one line that says what was asked, what was seen and what would work, before anything changed."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

import hf_softheads as sh
from hf_softheads.cli import main
from hf_softheads.plan import dense_head
from hf_softheads.registry import Bounds, Spec, spec_from_dict, variants

from .conftest import VOCAB, make_model

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
    ("head", "quantized", "group", "x", "must be int | None, got 'x'"),
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


@contextlib.contextmanager
def refused(model: Any, error: type[Exception], message: str) -> Iterator[None]:
    """Within, an error of this type whose one line matches the message is raised, and the model stays as it is."""
    state, kind, mode = copy.deepcopy(model.state_dict()), type(model), model.training
    settings = copy.deepcopy(model.config.to_dict())
    with pytest.raises(error, match=message) as caught:
        yield
    assert caught.type is error
    one_line(caught.value)
    assert type(model) is kind
    assert model.training is mode
    assert model.config.to_dict() == settings
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


IDS = torch.randint(3, VOCAB, (8, 12), generator=torch.Generator().manual_seed(0))
KL = {sh.losses.KL(): 1.0}
DOORS: dict[str, Callable[[Any], Any]] = {
    "patch": lambda m: sh.patch(m, head="dense"),
    "unpatch": sh.unpatch,
    "describe": sh.describe,
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
    repair = sh.repair_head(model, dense_head(model), IDS, steps=20, batch_size=32)
    assert repair.last < repair.first
