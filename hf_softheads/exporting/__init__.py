"""Writing a model as one folder, in a format that this package or other software reads: whole or not at all."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_softheads.bridge import transformers_model
from hf_softheads.exporting.writing import Writing
from hf_softheads.files import check_output, new_folder
from hf_softheads.registry import did_you_mean

FORMATS = {
    "transformers": "hf_softheads.exporting.patched_folder",
    "compressed-tensors": "hf_softheads.exporting.compressed_tensors",
    "gguf": "hf_softheads.exporting.gguf_file",
}
"""The module of each format: `prepare(model, tokenizer, **options)` refuses or gives a `Writing`."""


def export(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    results: Mapping[str, Any] | None = None,
    *,
    format: str = "transformers",
    **options: Any,
) -> Path:
    """Save a model and its tokenizer as one folder, whole or not at all.

    Everything is written beside `folder` under a temporary name and then renamed.

    Args:
        results: what `cards.write_card` renders into the folder's card; kept as `softheads_results.json` too. Only
            with "transformers".
        format: "transformers": a patched model for this package, as `save_pretrained` writes it.
            "compressed-tensors": a `quantized` head with `levels="integers"` and 4 or 8 bits as a plain packed
            checkpoint, which transformers loads without this package where `compressed-tensors` is installed; a tied
            embedding becomes dense. "gguf": a llama or Gemma 3 model as one file for llama.cpp; options as of
            `gguf_file.prepare`.
        options: of the format.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: an unknown format or option, or a model that the format cannot hold; says which it could.
        FileExistsError: `folder` exists and is not empty.
        OSError: the place is not writable, or has too little room; nothing stays behind.
    """
    folder, base = Path(folder), transformers_model(model)
    if results is not None:
        if format != "transformers":
            raise ValueError(
                f"results= are for the card of format='transformers'; format={format!r} has none"
            )
        options["results"] = {"repo": folder.name, **results}
    prepare = check_options(format, options)
    check_output(folder)
    writing = prepare(base, tokenizer, **options)
    check_output(folder, writing.nbytes)
    with new_folder(folder) as fresh:
        writing.write(fresh)
    return folder


def check_options(format: str, options: Mapping[str, Any]) -> Callable[..., Writing]:
    """The `prepare` of a format that has all of these options.

    Raises:
        ValueError: there is no such format, or it lacks one of them.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r}; {did_you_mean(str(format), FORMATS)}")
    prepare: Callable[..., Writing] = importlib.import_module(FORMATS[format]).prepare
    known = inspect.signature(prepare).parameters.keys() - {"model", "tokenizer"}
    for name in options.keys() - known:
        raise ValueError(f"format={format!r} has no option {name!r}; {did_you_mean(name, known)}")
    return prepare
