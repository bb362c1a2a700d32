"""Input embeddings. One file per variant; every class defined there is available here by its class name."""

from typing import Any

from hf_softheads.registry import did_you_mean, import_variants

_classes = import_variants(__name__)
globals().update(_classes)
__all__ = sorted(_classes)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"hf_softheads.embeddings has no {name!r}; {did_you_mean(name, __all__)}")
