"""A decoder-only language model by its name: a Hub id, a folder or `embedded`. What cannot work is refused in one line,
before its weights are read; a model whose head would be random, before anything is fitted to it.

    model = find("runs/tiny").load()
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hf_softheads.bridge.kinds import diffusers_class
from hf_softheads.files import read_json
from hf_softheads.registry import did_you_mean
from hf_softheads.text import embedded

if TYPE_CHECKING:
    import torch

_WANTED = "decoder-only language models can be loaded here, such as Llama, Qwen or GPT-2"
_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError)


@dataclass(frozen=True)
class NamedModel:
    """A model that was found and looks right; its weights are not read yet. `gguf`: the file that they are in."""

    name: str
    config: Any
    tokenizer: Any
    gguf: str | None = None

    @property
    def window(self) -> int:
        """Tokens that it was trained for, at most 1,024."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None) or 1024
        return int(min(limit, 1024))

    def load(self, dtype: torch.dtype | str = "auto") -> Any:
        """The model with its weights; `auto` keeps the precision that they are saved in.

        Raises:
            OSError: they cannot be read.
            ValueError: some that the model needs are not there.
        """
        from transformers import AutoModelForCausalLM

        if self.name == embedded.NAME:
            return embedded.load_embedded("float32" if dtype == "auto" else dtype)[0]
        options: dict[str, Any] = {}
        if self.gguf is not None:
            options["gguf_file"], dtype = self.gguf, "float32" if dtype == "auto" else dtype
        try:
            with _quiet():
                model, report = AutoModelForCausalLM.from_pretrained(
                    self.name, dtype=dtype, output_loading_info=True, **options
                )
        except SafetensorError as error:
            raise OSError(
                f"cannot load {self.name!r}: its weights are truncated or damaged ({_first_line(error)}); download "
                "them again"
            ) from error
        except _ERRORS as error:
            raise OSError(f"cannot load {self.name!r}: {_first_line(error)}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{self.name!r} ({_architecture(self.config)}) holds no weights for {', '.join(missing[:3])}{more}, "
                f"which {type(model).__name__} needs; transformers would start them at random, so there is nothing "
                "to retrofit or to measure; give a checkpoint that was saved with its language model head"
            )
        return model

    def nbytes(self) -> int:
        """Bytes of the weights' files; of a model that is no folder, 0."""
        folder = embedded.FOLDER if self.name == embedded.NAME else Path(self.name)
        kinds = (".safetensors", ".gguf", ".bin")
        files = folder.iterdir() if folder.is_dir() else ()
        return sum(file.stat().st_size for file in files if file.suffix in kinds)


def find(name: str) -> NamedModel:
    """The model of that name, with its configuration and tokenizer.

    Raises:
        OSError: there is none, or none that can be read.
        ValueError: it is no decoder-only language model.
    """
    from transformers import AutoConfig, AutoTokenizer

    place = str(embedded.FOLDER) if name == embedded.NAME else name
    gguf = _gguf_file(Path(place))
    options = {} if gguf is None else {"gguf_file": gguf}
    place_of_config = place if gguf else _place_of_config(place)
    try:
        config = AutoConfig.from_pretrained(place_of_config, **options)
    except _ERRORS as error:
        if not Path(name).exists():
            raise OSError(_not_there(name, _first_line(error))) from error
        raise OSError(f"cannot load {name!r}: {_first_line(error)}") from error
    _check_kind(name, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except _ERRORS as error:
        raise OSError(
            f"{name!r} holds a model but no tokenizer that can be loaded; put its tokenizer there too "
            f"({_first_line(error)})"
        ) from error
    return NamedModel(name, config, tokenizer, gguf)


def _gguf_file(folder: Path) -> str | None:
    """The GGUF file of a folder that holds one and no config.json."""
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"cannot load {str(folder)!r}: it holds several GGUF files ({', '.join(files)}); leave one in it"
        )
    return files[0] if files else None


def _place_of_config(name: str) -> str:
    """The folder or Hub id itself; for a folder with a PEFT adapter, those of the adapter's model."""
    folder = Path(name)
    if folder.is_file():
        raise OSError(f"cannot load {name!r}: it is a file; give the folder that it is in")
    if not name or not folder.is_dir():
        if _looks_like_path(name):
            raise OSError(_not_there(name))
        return name
    adapter, plain = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file() and not plain.is_file():
        found = read_json(adapter)
        base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
        if not isinstance(base, str):
            raise ValueError(f"cannot load {name!r}: its adapter_config.json names no model")
        return base
    if (foreign := diffusers_class(folder)) is not None:
        raise ValueError(f"cannot load {name!r}: it holds {foreign} of diffusers; {_WANTED}")
    if not plain.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise OSError(
            f"cannot load {name!r}: the folder has no config.json (it holds {held}); give a folder that "
            "save_pretrained wrote"
        )
    found = read_json(plain)
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ValueError(
            f"cannot load {name!r}: its config.json names no model_type, so it is no model's configuration"
        )
    return name


def _looks_like_path(name: str) -> bool:
    return not name or name.startswith((".", "/", "~", "\\")) or name.count("/") > 1


def _not_there(name: str, reason: str = "") -> str:
    close = did_you_mean(name, [embedded.NAME]).partition("?")
    hint = f"; {close[0]}?" if close[1] else f"; {embedded.NAME!r} works without a Hub"
    if _looks_like_path(name):
        return f"cannot load {name!r}: no such folder{hint}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return (
            f"cannot load {name!r}: no such folder, and as a Hub id it is not in the cache and cannot be fetched "
            f"(HF_HUB_OFFLINE is set){hint}"
        )
    return f"cannot load {name!r}: no such folder, and as a Hub id: {reason}{hint}"


def _check_kind(name: str, config: Any) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    causal, masked = (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING,
        type(config) in MODEL_FOR_MASKED_LM_MAPPING,
    )
    saved_as = config.architectures or ()
    if config.is_encoder_decoder and not any(cls.endswith("ForCausalLM") for cls in saved_as):
        what = "an encoder-decoder"
    elif masked and not getattr(
        config, "is_decoder", causal
    ):  # those that can be both say which they are
        what = "an encoder, which does not predict the next token"
    elif not causal:
        what = "no language model"
    else:
        return
    raise ValueError(
        f"cannot load {name!r}: {_architecture(config)} ({config.model_type}) is {what}; {_WANTED}"
    )


def _architecture(config: Any) -> str:
    return next(iter(config.architectures or ()), type(config).__name__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report on what it loaded: `NamedModel.load` says what matters of it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
