"""Names, dictionaries and specs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import hf_softheads as sh
from hf_softheads.heads.base import HeadSpec
from hf_softheads.registry import spec_from_dict, variants

EVERY = [
    (kind, name) for kind in ("head", "classifier", "attention", "loss") for name in variants(kind)
]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_variant_is_named_after_its_file_and_exported(kind, name):
    cls = variants(kind)[name]
    assert cls.__module__.rpartition(".")[2] == name
    package = {
        "head": sh.heads,
        "classifier": sh.classifiers,
        "attention": sh.attention,
        "loss": sh.losses,
    }[kind]
    assert getattr(package, cls.__name__) is cls
    assert cls.__name__ in package.__all__
    assert len((cls.__doc__ or "").strip()) > 40


def test_a_name_is_defined_once_and_in_its_file():
    with pytest.raises(ValueError, match=r"'vq' must be defined in vq\.py"):

        class Impostor(HeadSpec, name="vq"):
            pass

    Impostor = dataclass(frozen=True)(
        type("Impostor", (object,), {"__module__": "elsewhere.vq", "__qualname__": "Impostor"})
    )
    with pytest.raises(ValueError, match=r"already defined by hf_softheads\.heads\.vq"):
        type("Impostor", (HeadSpec,), {"__module__": Impostor.__module__}, name="vq")


def test_round_trip():
    spec = sh.heads.VQ(codes=7, singletons=2, bias="prior")
    assert spec_from_dict("head", spec.to_dict()) == spec
    config = sh.SoftheadsConfig(head=spec, attention={0: "softmax", -1: sh.attention.SSMax()})
    again = sh.SoftheadsConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.attention == {0: sh.attention.Softmax(), -1: sh.attention.SSMax()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("vqq", r"unknown head variant 'vqq'; did you mean 'vq'\? valid: "),
        ({"name": "vq", "code": 7}, r"'vq' has no field 'code'; did you mean 'codes'\?"),
        ({"name": "vq"}, "needs a value for 'codes'"),
        (
            {"name": "vq", "codes": 7, "init": "kmean"},
            r"vq\.init must be one of 'kmeans', 'random'",
        ),
        ({"codes": 7}, "is a dictionary with a 'name'"),
        (sh.attention.Softmax(), "expected a head variant, got the attention variant 'softmax'"),
    ],
)
def test_bad_specs(data, message):
    with pytest.raises(ValueError, match=message):
        spec_from_dict("head", data)


@pytest.mark.parametrize("codes", ["many", 1.5, True, None, [3]])
def test_fields_have_types(codes):
    with pytest.raises(ValueError, match=r"vq\.codes must be int, got"):
        spec_from_dict("head", {"name": "vq", "codes": codes})


def test_namespace_says_what_there_is():
    with pytest.raises(AttributeError, match=r"no 'VQQ'; did you mean 'VQ'\?"):
        _ = sh.heads.VQQ


def test_public_names_are_sorted_and_exist():
    assert sh.__all__ == sorted(sh.__all__)
    assert all(hasattr(sh, name) for name in sh.__all__)
