"""Names <-> spec classes, specs <-> plain dictionaries.

A *spec* is a frozen dataclass whose fields are its hyper-parameters, its JSON and its command-line options.
Every variant is one such class in one file named after it; importing a kind's package imports all of its files.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import numbers
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a field's number may be: `rate: Annotated[float, Bounds(above=0, at_most=1)] = 0.1`."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    hint: str = ""  # what to use instead of what lies outside

    def hold(self, value: float) -> bool:
        return not (
            (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and value >= self.below)
            or (self.at_most is not None and value > self.at_most)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            text = f"from {self.at_least} to {self.at_most}"
        elif self.above is not None and self.below is not None:
            text = f"between {self.above} and {self.below}, both excluded"
        else:
            positive = "positive" if self.above == 0 else f"greater than {self.above}"
            said = {
                positive: self.above,
                f"at least {self.at_least}": self.at_least,
                f"less than {self.below}": self.below,
                f"at most {self.at_most}": self.at_most,
            }
            text = " and ".join(words for words, bound in said.items() if bound is not None)
        return f"{text} ({self.hint})" if self.hint else text


Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(at_least=0)]
Count = Annotated[int, Bounds(at_least=1)]
CountOrZero = Annotated[int, Bounds(at_least=0)]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Base of all variants. A direct subclass names a kind, a named subclass is a variant:

        class HeadSpec(Spec, kind="head"): ...
        @dataclass(frozen=True)
        class VQ(HeadSpec, name="vq"): ...      # in a file called vq.py

    Whoever makes one, Python, JSON or the command line, its fields are checked: types by their annotations (JSON lists
    become tuples, integers floats, dictionaries specs), floats are finite, numbers within the annotation's `Bounds`.
    A variant's own `__post_init__` checks what fields mean together; it finds them checked one by one.

    Raises:
        ValueError: a field of the wrong type or out of its bounds. At its definition: the name is taken, or is not the
            stem of the file that defines the class.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    _registered: ClassVar[dict[str, dict[str, type[Spec]]]] = {}

    def __post_init__(self) -> None:
        self._check_fields()

    def __init_subclass__(cls, *, kind: str | None = None, name: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__post_init__" in cls.__dict__:
            cls.__post_init__ = _after_fields(cls.__post_init__)  # type: ignore[method-assign, assignment]
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

    def _check_fields(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]  # mypy takes a dataclass for unhashable
        for field in dataclasses.fields(self):
            given, where = (
                getattr(self, field.name),
                f"{self.name or type(self).__name__}.{field.name}",
            )
            checked = _checked(given, hints[field.name], where)
            if checked is not given:
                object.__setattr__(self, field.name, checked)

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
    """Every kind of variant, sorted."""
    return tuple(sorted(Spec._registered))


def spec_from_dict(kind: str, data: Any) -> Any:
    """The spec that `data` describes: `{"name": "vq", "codes": 512}`, or just `"vq"`, or a spec (returned as it is).

    Raises:
        ValueError: no or unknown name, an unknown field, a missing field or one with a value that it cannot have, or
            the class of a variant instead of an instance.
    """
    if isinstance(data, type) and issubclass(data, Spec):
        raise ValueError(
            f"{_a(kind)} variant is given as an instance, got the class {data.__name__}; give an instance: "
            f"{data.__name__}({', '.join(f'{name}=…' for name in _required(data))})"
        )
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
    fields = [f.name for f in dataclasses.fields(cls)]
    values = {key: value for key, value in data.items() if key != "name"}
    for key in values:
        if key not in fields:
            raise ValueError(
                f"{kind} variant {name!r} has no field {key!r}; {did_you_mean(key, fields)}"
            )
    for key in _required(cls):
        if key not in values:
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


def _required(cls: type[Spec]) -> list[str]:
    missing = dataclasses.MISSING
    return [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is missing and f.default_factory is missing
    ]


# -- checking fields ---------------------------------------------------------------------------------------------------


class _WrongType(ValueError):
    """A value that is not of the annotated type; of a union, another option may take it."""


def _after_fields(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """A variant's own `__post_init__`, after the check of every field by itself."""

    @functools.wraps(check)
    def __post_init__(self: Any) -> None:
        self._check_fields()
        check(self)

    return __post_init__


@functools.cache
def _hints(cls: type[Spec]) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _checked(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type: JSON lists become tuples, integers floats, dictionaries specs."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _checked(value, arguments[0], where)
        for bounds in arguments[1:]:
            if isinstance(bounds, Bounds) and not bounds.hold(found):
                raise ValueError(f"{where} must be {bounds}, got {value!r}")
        return found
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            literal = typing.get_origin(option) is typing.Literal
            if literal and value not in typing.get_args(option):
                continue
            try:
                return _checked(value, option, where)
            except _WrongType:
                continue
    elif origin is typing.Literal:
        for option in arguments:
            if type(option) is type(value) and option == value:
                return value
        raise ValueError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
    elif origin is tuple and isinstance(value, list | tuple):
        inner = arguments[0] if arguments else Any
        return tuple(_checked(v, inner, f"{where}[{i}]") for i, v in enumerate(value))
    elif hint is Any or (hint is type(None) and value is None):
        return value
    elif isinstance(hint, type) and issubclass(hint, Spec):
        if isinstance(value, Spec | Mapping | str | type):
            return spec_from_dict(hint.kind, value)
    elif hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, numbers.Real):
            if not math.isfinite(value):
                raise ValueError(f"{where} must be finite, got {value!r}")
            return value if isinstance(value, float) else float(value)
    elif hint is int:
        if isinstance(value, numbers.Integral):
            return int(value)
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _WrongType(f"{where} must be {_type_name(hint)}, got {value!r}")


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)
