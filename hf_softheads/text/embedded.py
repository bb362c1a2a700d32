"""The small language model that comes with the package, so that everything can be tried offline.

A 4.7 M-parameter Llama (vocabulary 8,192, hidden size 192, grouped-query attention, untied head) that
`recipes/pretrain_tiny.py` trained on the source text of the Python standard library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "embedded"
FOLDER = Path(__file__).parents[1] / "assets" / "tiny"


def load_embedded(dtype: torch.dtype | str = "float32") -> tuple[Any, Any]:
    """The embedded model and its tokenizer.

    Raises:
        FileNotFoundError: the package was installed without its assets.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (FOLDER / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded model is not in {FOLDER}; reinstall the package, or make it with "
            "`accelerate launch recipes/pretrain_tiny.py --output runs/tiny`"
        )
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(FOLDER)
