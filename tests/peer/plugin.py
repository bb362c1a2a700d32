"""pytest plugin: every model that a test builds is patched as soon as it stands, unless `--plan` is empty."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
from transformers import PreTrainedModel

from hf_softheads import SoftheadsConfig, patch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plan", default="", help='JSON, {"attention": …, "head": …}')


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    plan = json.loads(config.getoption("--plan") or "{}")
    if not plan:
        return
    for cls in {c for item in items for c in getattr(item.cls, "all_model_classes", ())}:
        _patch_when_built(cls, plan)


def _patch_when_built(cls: type[PreTrainedModel], plan: dict[str, Any]) -> None:
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
    load = cls.from_pretrained.__func__

    @functools.wraps(load)
    def loaded(asked: type, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        nowhere = not args and kwargs.get("pretrained_model_name_or_path") is None
        if (nowhere or args[:1] == (None,)) and not hasattr(config, "quantization_config"):
            # A state dict of a patched model beside a configuration that knows nothing of it.
            kwargs["config"] = copy.deepcopy(config)
            own = {k: v for k, v in plan.items() if k != "head" or "LM" in asked.__name__}
            kwargs["config"].quantization_config = SoftheadsConfig(**own)
        return load(asked, *args, **kwargs)

    cls.from_pretrained = classmethod(loaded)


_building: list[type] = []
