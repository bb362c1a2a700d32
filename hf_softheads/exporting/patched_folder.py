"""The format that this package loads again: `save_pretrained`, the tokenizer and the card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_softheads.exporting.writing import Writing
from hf_softheads.files import write_json
from hf_softheads.measure.sizes import head_sizes
from hf_softheads.report import cards
from hf_softheads.sites.lm_head import head_of


def prepare(model: Any, tokenizer: Any, results: Mapping[str, Any] | None = None) -> Writing:
    """A model as it is."""
    nbytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if results is not None:
            head = head_of(model)
            measured = {} if head is None else head_sizes(head)
            found = {"sizes": measured, **results}
            write_json(folder / cards.RESULTS, found)
            cards.write_card(folder, found)

    return Writing(nbytes, write)
