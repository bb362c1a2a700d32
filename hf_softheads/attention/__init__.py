"""Attention variants. One file per variant, those with a recurrent state in `linear/`; every class defined there is
available here by its class name."""

from typing import Any

from hf_softheads.attention.base import attend as attend
from hf_softheads.attention.call import Geometry as Geometry
from hf_softheads.attention.call import State as State
from hf_softheads.registry import did_you_mean, import_variants

_classes = {**import_variants(__name__), **import_variants(f"{__name__}.linear")}
globals().update(_classes)
__all__ = sorted([*_classes, "Geometry", "State", "attend"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"hf_softheads.attention has no {name!r}; {did_you_mean(name, __all__)}")
