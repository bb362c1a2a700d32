"""Writing folders: a patched model, its tokenizer and its card, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_softheads.bridge import transformers_model
from hf_softheads.files import check_output, new_folder, write_json
from hf_softheads.measure.sizes import head_sizes
from hf_softheads.report import cards
from hf_softheads.sites.lm_head import head_of


def export(
    model: Any, folder: str | Path, tokenizer: Any = None, results: Mapping[str, Any] | None = None
) -> Path:
    """Save a patched model, its tokenizer and its card as one folder, whole or not at all.

    Everything is written beside `folder` under a temporary name and then renamed.

    Args:
        results: what `cards.write_card` renders; kept as `softheads_results.json` too.

    Raises:
        TypeError: `model` is not a transformers model.
        FileExistsError: `folder` exists and is not empty.
        OSError: the place is not writable, or has too little room; nothing stays behind.
    """
    folder, model = Path(folder), transformers_model(model)
    needed = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    check_output(folder, needed)
    with new_folder(folder) as fresh:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        if results is not None:
            head = head_of(model)
            measured = {} if head is None else head_sizes(head)
            results = {"sizes": measured, "repo": folder.name, **results}
            write_json(fresh / cards.RESULTS, results)
            cards.write_card(fresh, results)
    return folder
