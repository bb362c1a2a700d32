"""What kind of model a configuration or a folder is of, and which of transformers' classes loads it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# transformers' names of a task: in its tables, in the order in which a family is looked up, and of the loading class.
_TASKS = {
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "MASKED_LM": "AutoModelForMaskedLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
}


def loading_class(model_type: str, saved_as: Iterable[str] = ()) -> str | None:
    """The class that loads models of a family with their LM head, by the class that one was saved as, else by the
    family; None if there is none."""
    from transformers.models.auto import modeling_auto

    tables = {
        loader: getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for task, loader in _TASKS.items()
    }
    for cls in saved_as:
        for loader, table in tables.items():
            if cls in table.values():
                return loader
    return next((loader for loader, table in tables.items() if model_type in table), None)


def how_to_load(config: Any, more: str = "") -> str:
    """`load it with AutoModelFor…` and `more`, or that no model of this family has an LM head."""
    loader = loading_class(config.model_type)
    if loader is None:
        return f"{config.model_type} is no family of language models"
    return f"load it with {loader}{more}"


def named(place: str | os.PathLike[str]) -> str:
    """What lies in a folder that was given for a model, or that a name was given, and how it is loaded."""
    folder = Path(place)
    first = "load it first: {}.from_pretrained(" + repr(str(place)) + ")"
    if not folder.is_dir():
        return f"the name {str(place)!r}; {first.format('AutoModelForCausalLM')}"
    what, loader = _inside(folder)
    if loader is None:
        return f"the folder {str(place)!r}, which holds {what} and no language model"
    return f"the folder {str(place)!r} with {what}; {first.format(loader)}"


def _inside(folder: Path) -> tuple[str, str | None]:
    """What a folder holds, and the class that loads it if it is a language model."""
    foreign = diffusers_class(folder)
    if foreign is not None:
        return f"{foreign} of diffusers", None
    config = _json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        return "no config.json of a model", None
    saved_as = config.get("architectures") or []
    name = next(iter(saved_as), config["model_type"])
    return str(name), loading_class(config["model_type"], saved_as)


def diffusers_class(folder: Path) -> str | None:
    """The class of a pipeline or a model of diffusers that was saved in a folder; None for any other folder."""
    for file in ("model_index.json", "config.json"):
        found = _json(folder / file).get("_class_name")
        if isinstance(found, str):
            return found
    return None


def _json(file: Path) -> dict[str, Any]:
    """A dictionary in a JSON file; empty where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
