"""Names <-> spec classes, specs <-> plain dictionaries.

A *spec* is a frozen dataclass whose fields are its hyper-parameters, its JSON and its command-line options.
Every variant is one such class in one file named after it; importing a kind's package imports all of its files.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import pkgutil
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

S = TypeVar("S", bound="Spec")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Base of all variants. A direct subclass names a kind, a named subclass is a variant:

        class HeadSpec(Spec, kind="head"): ...
        @dataclass(frozen=True)
        class VQ(HeadSpec, name="vq"): ...      # in a file called vq.py

    Raises:
        ValueError: the name is taken, or is not the stem of the file that defines the class.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    _registered: ClassVar[dict[str, dict[str, type[Spec]]]] = {}

    def __init_subclass__(cls, *, kind: str | None = None, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind = kind
            Spec._registered.setdefault(kind, {})
        if name is None:
            return
        stem = cls.__module__.rpartition(".")[2]
        if stem not in (name, "__main__"):
            raise ValueError(
                f"{cls.kind} variant {name!r} must be defined in {name}.py, not in {stem}.py"
            )
        known = Spec._registered[cls.kind].get(name)
        # `@dataclass(slots=True)` and notebook cells define the same class again: same place, same variant.
        if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.kind} variant {name!r} is already defined by {known.__module__}"
            )
        cls.name = name
        Spec._registered[cls.kind][name] = cls

    def to_dict(self) -> dict[str, Any]:
        """`{"name": …, field: value, …}`, ready for JSON; nested specs become dictionaries too."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"name": self.name, **values}

    def short(self) -> str:
        """`name(field=value, …)` with the fields that differ from their default."""
        set_here = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)}' for f in set_here)})"


def variants(kind: str) -> dict[str, type[Spec]]:
    """All registered variants of a kind, sorted by name."""
    return dict(sorted(Spec._registered[kind].items()))


def kinds() -> tuple[str, ...]:
    """Every kind of variant, in the order in which they were defined."""
    return tuple(Spec._registered)


def spec_from_dict(kind: str, data: Mapping[str, Any] | str | Spec) -> Any:
    """The spec that `data` describes: `{"name": "vq", "codes": 512}`, or just `"vq"`, or a spec (returned as it is).

    Raises:
        ValueError: no or unknown name, an unknown field, a missing field or one of the wrong type.
    """
    if isinstance(data, Spec):
        if data.kind != kind:
            raise ValueError(
                f"expected {_a(kind)} variant, got the {data.kind} variant {data.name!r}"
            )
        return data
    if isinstance(data, str):
        data = {"name": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise ValueError(f"{_a(kind)} variant is a dictionary with a 'name', got {data!r}")
    name = data["name"]
    known = variants(kind)
    if name not in known:
        raise ValueError(f"unknown {kind} variant {name!r}; {did_you_mean(name, known)}")
    cls = known[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key == "name":
            continue
        if key not in fields:
            raise ValueError(
                f"{kind} variant {name!r} has no field {key!r}; {did_you_mean(key, fields)}"
            )
        values[key] = _coerce(value, hints[key], kind, f"{name}.{key}")
    for key, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and key not in values:
            raise ValueError(f"{kind} variant {name!r} needs a value for {key!r}")
    return cls(**values)


def import_variants(package: str) -> dict[str, type[Spec]]:
    """Import every module of a package; its spec classes by class name, for the package's namespace."""
    module = importlib.import_module(package)
    found: dict[str, type[Spec]] = {}
    for info in pkgutil.iter_modules(module.__path__):
        child = importlib.import_module(f"{package}.{info.name}")
        for value in vars(child).values():
            defined_here = getattr(value, "__module__", None) == child.__name__
            if defined_here and isinstance(value, type) and issubclass(value, Spec) and value.name:
                found[value.__name__] = value
    return found


def read_setting(text: str) -> tuple[str, Any]:
    """`FIELD=VALUE` from a command line: the value as JSON, or as the word that it is.

    Raises:
        ValueError: there is no `=`.
    """
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise ValueError(f"--set takes FIELD=VALUE, got {text!r}")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value  # a bare word is a string


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? valid: x, y, z`"""
    names = sorted(known)
    close = difflib.get_close_matches(asked, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(names) if names else 'none'}"


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _coerce(value: Any, hint: Any, kind: str, where: str) -> Any:
    """`value` as the annotated type: JSON lists become tuples, integers floats, dictionaries specs."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(value, option, kind, where)
            except TypeError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    elif origin is tuple and isinstance(value, list | tuple):
        inner = arguments[0] if arguments else Any
        return tuple(_coerce(v, inner, kind, where) for v in value)
    elif hint is Any or (hint is type(None) and value is None):
        return value
    elif isinstance(hint, type) and issubclass(hint, Spec):
        if isinstance(value, Spec | Mapping | str):
            return spec_from_dict(hint.kind, value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise TypeError(f"{where} must be {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("NoneType", "None")
