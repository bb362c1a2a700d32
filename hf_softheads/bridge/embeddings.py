"""The embeddings that read the head's matrix, and which tokens are special."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_softheads.bridge.heads import find_head
from hf_softheads.bridge.loading import local_file
from hf_softheads.embeddings.head_rows import RowsEmbedding
from hf_softheads.heads.base import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bind_rows(model: Any) -> None:
    """Let the embeddings of a tied model read the rows of its head."""
    head = model.get_output_embeddings()
    for module in model.modules() if isinstance(head, Head) else ():
        if isinstance(module, RowsEmbedding):
            module.bind(head)


def tied_embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What shares its matrix with the head, by path, the model's own input embedding first; empty if it is untied.

    A model on the meta device has not been tied yet, but says what will be.
    """
    path, head = find_head(model)
    names = _tied_to(f"{path}.weight", model.get_expanded_tied_weights_keys(all_submodels=True))
    found = {}
    for at, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if module is head or weight is None:
            continue
        declared = f"{at}.weight" in names
        if weight is head.weight or (declared and weight.device.type == "meta"):
            found[at] = module
    first = model.get_input_embeddings()
    return dict(sorted(found.items(), key=lambda item: item[1] is not first))


def _tied_to(name: str, ties: dict[str, str]) -> set[str]:
    """The names of one group of `{target: source}`."""
    group = {name}
    while True:
        more = {n for pair in ties.items() if group & set(pair) for n in pair} - group
        if not more:
            return group
        group |= more


def special_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Ids of the tokens that mark something, as the model's settings and the tokenizer beside its checkpoint say."""
    found: set[int] = set()
    for settings in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for name in ("bos", "eos", "pad", "decoder_start", "sep", "cls", "mask", "unk"):
            value: Any = getattr(settings, f"{name}_token_id", None)
            found |= set(value if isinstance(value, list | tuple) else [value])
    file = local_file(model, "tokenizer.json")
    if file is not None:
        added: list[dict[str, Any]] = json.loads(file.read_text()).get("added_tokens") or []
        found |= {token["id"] for token in added if token.get("special")}
    vocab = len(model.get_output_embeddings().weight)
    return tuple(sorted(i for i in found if isinstance(i, int) and 0 <= i < vocab))
