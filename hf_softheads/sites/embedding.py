"""The input embedding of a model whose head reads the same matrix: both ends share the new head's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_softheads import bridge
from hf_softheads.embeddings.head_rows import RowsEmbedding, RowsTwin
from hf_softheads.registry import spec_from_dict, variants
from hf_softheads.sites.base import Fitting, Part, Row, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Embeddings = dict[str, nn.Embedding]


class Embedding(Site):
    """`tie=True` or a variant; what a model that was tied gets by default where the head allows it, unless `tie=False`.

    The new modules are `{path: module}`, the one that holds the parameters first.
    """

    slot = "tie"
    kind = "embedding"
    order = 40

    def parse(self, value: Any, options: Mapping[str, Any]) -> Part:
        return Part(_default() if value is True else spec_from_dict(self.kind, value))

    def by_default(self, model: PreTrainedModel, parts: Mapping[str, Part]) -> Part | None:
        head = parts.get("head")
        if head is None or head.value.kind != "head" or not bridge.tied_embeddings(model):
            return None
        try:
            return self.complete(model, Part(_default()), parts)
        except ValueError:
            return None  # this head has no rows, or the embedding does something of its own: untied as ever

    def complete(self, model: PreTrainedModel, part: Part, parts: Mapping[str, Part]) -> Part:
        head = parts.get("head")
        if head is None or head.value.kind != "head":
            raise ValueError(
                "tie= lets the input embedding read the rows of a new head; it needs head=variant"
            )
        path, dense = bridge.find_head(model)
        if not bridge.tied_embeddings(model):
            raise ValueError(
                f"tie={part.value.short()}, but the input embedding of this {type(model).__name__} has a matrix of its "
                f"own, other than that of its head {path}; leave tie out"
            )
        _check(path, bridge.tied_embeddings(model))
        vocab, dim = dense.weight.shape
        head.value.check(dim, vocab)
        with torch.device("meta"):
            empty = head.value.module(dim, vocab)
        return Part(part.value.complete(empty))

    def build(self, model: PreTrainedModel, part: Part) -> Embeddings:
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"the input embedding of this checkpoint reads the rows of its head, which a {type(model).__name__} "
                "does not have; load it with AutoModelForCausalLM"
            )
        old: dict[str, Any] = bridge.tied_embeddings(model)
        made: dict[int, nn.Embedding] = {}
        first = None
        for module in old.values():
            if id(module) in made:
                continue
            if first is None:
                first = part.value.module(module)
                made[id(module)] = first
            else:
                made[id(module)] = RowsTwin.like(module, first)
        return {path: made[id(module)] for path, module in old.items()}

    def prepare(self, model: PreTrainedModel, part: Part, fitting: Fitting) -> Embeddings:
        _, dense = bridge.find_head(model)
        new = self.build(model, part)
        first = _first(new)
        first.bind(fitting.prepared["head"])
        part.value.fit(first, dense.weight.detach(), fitting.stats, bridge.special_tokens(model))
        old = bridge.tied_embeddings(model)
        for path, module in new.items():
            if hasattr(old[path], "_hf_hook"):
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(module, old[path]._hf_hook)
        return new

    def present(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        every = model.named_modules(remove_duplicate=False)
        return {path: module for path, module in every if isinstance(module, nn.Embedding)}

    def install(self, model: PreTrainedModel, new: Embeddings) -> None:
        head = model.get_output_embeddings()
        _first(new).bind(head)
        head.untied = False
        for path, module in new.items():
            model.set_submodule(path, module)
        bridge.leave_ties(model)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = True  # as the head site found it
        bridge.guard_weight(_first(new))

    def restore(self, model: PreTrainedModel, old: dict[str, Any] | None) -> None:
        vocab = bridge.vocabulary(model)
        for path, module in (old or {}).items():
            if model.get_submodule(path) is module:
                continue
            if len(module.weight) != vocab:  # in place, for all that share it
                model._get_resized_embeddings(module, vocab)
            module.num_embeddings = vocab
            model.set_submodule(path, module)

    def check_restore(self, old: dict[str, nn.Module] | None) -> None:
        if old is None:
            raise ValueError(
                "the dense embedding is no longer there: this model was loaded from a patched checkpoint; load the "
                "original one"
            )

    @torch.no_grad()
    def probe(self, model: PreTrainedModel, new: Embeddings) -> None:
        """The family's own forward must read the rows through ours."""
        first = _first(new)
        for path, module in new.items():
            if not _reads(module, first):
                raise ValueError(
                    f"{path} ({type(module).__name__}) looks its rows up by itself, so it cannot read those of the "
                    "head; give tie=False"
                )

    def describe(self, model: PreTrainedModel, part: Part) -> tuple[Iterable[Row], list[str]]:
        rows = []
        for path, module in model.named_modules():
            if isinstance(module, RowsEmbedding):
                own = module.state_dict(keep_vars=True).values()
                count = sum(p.numel() for p in module.parameters())
                size = sum(t.numel() * t.element_size() for t in own)
                rows.append(Row(path, part.value.short(), f"{count:,}", size, "torch"))
        return rows, ["the input embedding reads its rows from the head"] if rows else []


def _default() -> Any:
    return variants("embedding")["head_rows"]()


def _first(new: Embeddings) -> RowsEmbedding:
    first = next(iter(new.values()))
    assert isinstance(first, RowsEmbedding)
    return first


def _check(path: str, users: Mapping[str, nn.Module]) -> None:
    """Raise ValueError unless everything that shares the head's matrix is a lookup of its rows."""
    for at, module in users.items():
        if not isinstance(module, nn.Embedding):
            raise ValueError(
                f"the matrix of the head {path} is shared by {at} ({type(module).__name__}), which is no embedding; "
                "give tie=False, and what shared it keeps it"
            )
        if module.max_norm is not None:
            raise ValueError(
                f"{at} rescales its matrix in place (max_norm={module.max_norm}), so the head's rows cannot stand for "
                "it; give tie=False"
            )


def _reads(module: nn.Module, first: RowsEmbedding) -> bool:
    """Does a call of `module` read rows from `first`'s head?"""
    calls = []

    def read(tokens: Tensor) -> Tensor:
        calls.append(tokens)
        return RowsEmbedding.read(first, tokens)

    first.__dict__["read"] = read
    try:
        module(torch.zeros(1, 1, dtype=torch.long, device=first.weight.device))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    finally:
        del first.__dict__["read"]
    return bool(calls)
