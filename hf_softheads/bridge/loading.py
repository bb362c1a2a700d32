"""What a model was loaded from: whether its head came from there, and what bears its name once it is patched."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from hf_softheads.attention.base import AttentionVariant
from hf_softheads.classifiers.base import PooledClassifier
from hf_softheads.embeddings.head_rows import RowsEmbedding
from hf_softheads.heads.base import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' mark on every parameter that it read from a checkpoint
_LOADED = "_is_hf_initialized"
# Has no model and no tokenizer: who loads what a model is named after gets an error that says why, not another model.
IN_MEMORY = Path(__file__).parents[1] / "assets" / "patched_in_memory__save_it_and_load_that_folder"
_SOURCE = "softheads_source"


def source(model: PreTrainedModel) -> str:
    """The folder or Hub id that a model was loaded from, also while it is patched; empty if it was made here."""
    return str(model.__dict__.get(_SOURCE, model.name_or_path) or "")


def name_in_memory(model: PreTrainedModel) -> None:
    """Name a model that was just patched after a folder that cannot be loaded, since its own holds another model.

    `unpatch` puts the name back with the other settings. A model that was made here has no name and gets none.
    """
    if known := source(model):
        model.__dict__[_SOURCE] = known
        model.name_or_path = model.config.name_or_path = str(IN_MEMORY)


def check_loaded(model: PreTrainedModel, path: str, head: nn.Module) -> None:
    """Refuse a head at random: one without transformers' mark, in a loaded model, that its checkpoint does not hold.

    The mark alone will not do: a resized head has none either.

    Raises:
        ValueError: names what the checkpoint lacks.
    """
    bare = [f"{path}.{name}" for name, p in head.named_parameters() if not hasattr(p, _LOADED)]
    if not bare or not any(hasattr(p, _LOADED) for p in model.parameters()):
        return  # read from a checkpoint, or made by hand
    held = _checkpoint_names(model)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in bare:
        ends = [".".join(known.split(".")[-2:]) for known in (name, tied.get(name, name))]
        if held and not any(f".{key}".endswith(f".{end}") for key in held for end in ends):
            raise ValueError(
                f"{name} was not in the checkpoint {source(model)}, so transformers made it up at random; load a "
                f"checkpoint with a trained head. If you have trained it since, save {type(model).__name__} and load "
                "that"
            )


def check_complete(model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks tensors of what was put in: codes would be whatever lies in memory.

    Raises:
        ValueError: names what it lacks.
    """
    ours = (Head, AttentionVariant, PooledClassifier, RowsEmbedding)
    paths = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, ours))
    lacking = sorted(name for name in missing if name.startswith(paths))
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"{model.name_or_path} does not hold {', '.join(lacking[:3])}{more}, which the plan in its config.json "
            "asks for; the folder is damaged, export or download it again"
        )


def _checkpoint_names(model: PreTrainedModel) -> set[str]:
    """The tensors in the checkpoint that a model was loaded from; none where it is not at hand."""
    from transformers.modeling_utils import load_state_dict

    try:
        for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            if (file := local_file(model, index)) is not None:
                return set(json.loads(file.read_text())["weight_map"])
        if (file := local_file(model, SAFE_WEIGHTS_NAME)) is not None:
            with safe_open(str(file), framework="pt") as whole:
                return set(whole.keys())
        if (file := local_file(model, WEIGHTS_NAME)) is not None:
            return set(load_state_dict(str(file), map_location="meta"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError):
        pass  # replaced since, or of an old format
    return set()


def local_file(model: PreTrainedModel, name: str) -> Path | None:
    """A file beside the checkpoint that a model was loaded from, in its folder or in the cache; None elsewhere."""
    folder: Any = source(model)
    here = Path(folder, name)
    if folder and here.is_file():
        return here
    try:
        cached = try_to_load_from_cache(
            folder, name, revision=getattr(model.config, "_commit_hash", None)
        )
    except ValueError:  # no name of a repository
        return None
    return Path(cached) if isinstance(cached, str) else None
