"""Which parameters of a model are one, once a head has left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_softheads.embeddings.head_rows import RowsEmbedding, RowsTwin
from hf_softheads.heads.base import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def without_heads(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """`{target: source}` less the parameters of a `Head`; what shared a matrix through the head still does, unless it
    reads its rows from there now.

    A tie that the family made with the new head stays: BERT takes over the head's bias.
    """
    kept: dict[str, str] = {}
    heir: dict[str, str] = {}  # of a head's matrix: the first that was tied to it
    for target, source in ties.items():
        (one, of_head), (other, from_head) = _find(model, target), _find(model, source)
        if (one is not None and one is other) or not (of_head or from_head):
            kept[target] = source
        elif not of_head and source in heir:
            kept[target] = heir[source]
        elif not of_head:
            heir[source] = target
    return kept


def leave_ties(model: PreTrainedModel) -> None:
    """Let transformers tie none of the parameters of what has been put in."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None:
        model.all_tied_weights_keys = without_heads(model, tied)


def _find(model: nn.Module, name: str) -> tuple[Any, bool]:
    """What bears this name, and whether it is inside a `Head` or a wrapper around one."""
    module: Any = model
    *parts, last = name.split(".")
    within = False
    for part in parts:
        module = module._modules.get(part)
        if module is None:  # a pattern, or a place that is not there
            return None, within
        inner = module
        for wrapped in ("original_module", "base_layer"):  # as PEFT names them
            inner = inner._modules.get(wrapped, inner)
        within = within or isinstance(inner, Head | RowsEmbedding | RowsTwin)
    return module._parameters.get(last), within


def tied_names(model: PreTrainedModel) -> set[str]:
    """Every parameter that the model's classes and configs tie to another one."""
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {*ties, *ties.values()}
