"""pytest plugin: every model that a test builds is patched as soon as it stands, unless `--plan` is empty."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from transformers import PreTrainedModel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plan", default="", help='JSON, {"attention": …, "head": …}')


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    plan = json.loads(config.getoption("--plan") or "{}")
    if not plan:
        return
    import hf_softheads as sh

    for cls in {c for item in items for c in getattr(item.cls, "all_model_classes", ())}:
        _patch_when_built(cls, sh.patch, plan)


def _patch_when_built(cls: type[PreTrainedModel], patch: Any, plan: dict[str, Any]) -> None:
    build = cls.__init__

    @functools.wraps(build)
    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is not cls:
            return build(self, *args, **kwargs)
        _building.append(cls)
        try:
            build(self, *args, **kwargs)
        finally:
            _building.pop()
        if _building or any(p.is_meta for p in self.parameters()):
            return None  # a part of another model, or one that is being loaded
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config  # a second model from the configuration of a first
        own = dict(plan)
        if self.get_output_embeddings() is None:
            own.pop("head", None)
        if own:
            patch(self, **own)
        return None

    cls.__init__ = patched  # type: ignore[method-assign]


_building: list[type] = []
