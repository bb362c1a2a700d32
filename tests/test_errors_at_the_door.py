"""Errors at the door: one line that says what was asked, what was seen and what would work, before anything changed."""

from __future__ import annotations

import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import hf_softheads as sh
from hf_softheads.cli import main
from hf_softheads.registry import Bounds, Spec, spec_from_dict, variants

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
