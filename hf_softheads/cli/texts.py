"""The text that a command names, as token windows for a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_softheads.pretrained import NamedModel
    from hf_softheads.text.stdlib_corpus import Split
    from hf_softheads.text.windows import Windows


def rows(
    source: str,
    split: Split,
    model: NamedModel,
    window: int | None = None,
    stride: int | None = None,
) -> Windows:
    """Windows of a file, or of the standard library, of `window` tokens each; by default of `model.window`.

    Raises:
        OSError: there is no such file.
        ValueError: it is no text, or less than one window.
    """
    from hf_softheads.text.documents import read
    from hf_softheads.text.windows import windows

    width = window or model.window
    return windows(list(read(source, split)), model.tokenizer, window=width, stride=stride)
