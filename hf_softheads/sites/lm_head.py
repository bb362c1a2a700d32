"""The output embedding of a language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_softheads import bridge
from hf_softheads.heads.base import Head, LogitTransform
from hf_softheads.heads.forms.indices import check_indices
from hf_softheads.heads.stats import check_stats
from hf_softheads.sites.base import Fitting, Part, Row, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LMHead(Site):
    slot = "head"
    kind = "head"
    order = 10

    def is_in(self, model: PreTrainedModel) -> bool:
        return model.get_output_embeddings() is not None

    def build(self, model: PreTrainedModel, part: Part) -> Head:
        _, dense = bridge.find_head(model)
        vocab, dim = dense.weight.shape
        part.value.check(dim, vocab)
        head: Head = part.value.module(dim, vocab, bias=getattr(dense, "bias", None) is not None)
        _cast(head, dense.weight.dtype)
        return head

    def prepare(self, model: PreTrainedModel, part: Part, fitting: Fitting) -> Head:
        path, dense = bridge.find_head(model)
        spec, weight = part.value, dense.weight
        bias: Tensor | None = getattr(dense, "bias", None)
        _check_matrix(path, weight, bias)
        bridge.check_linear(path, dense)
        bridge.check_loaded(model, path, dense)
        transform = _rising_transform(model)
        vocab, dim = weight.shape
        spec.check(dim, vocab)
        if fitting.stats is not None:
            check_stats(fitting.stats)
            fitting.stats.check(dim, vocab)
        with torch.device(weight.device):
            head: Head = spec.module(dim, vocab, bias=bias is not None)
        head.use_kernels(fitting.kernels)
        fitting.demand(f"head {spec.name}", head.why_no_kernel())
        head.transform = transform
        own_bias = None if bias is None else bias.detach().float()
        spec.fit(head, weight.detach(), own_bias, fitting.stats)
        _cast(head, weight.dtype)
        head.requires_grad_(weight.requires_grad)
        head.train(dense.training)
        _take_over_hook(head, dense)
        return head

    def present(self, model: PreTrainedModel) -> nn.Module:
        old: nn.Module = bridge.find_head(model)[1]
        return old

    def install(self, model: PreTrainedModel, new: Head) -> None:
        """Put a head in place of the output embedding and untie it; every other tie of the model stays.

        `tie_word_embeddings` speaks for all ties at once, and in some families for a scale beside them: it becomes
        false only where the head's was the last one.
        """
        path, _ = bridge.find_head(model)
        new.untied = any(name.startswith(f"{path}.") for name in bridge.tied_names(model))
        model.set_output_embeddings(new)
        if not bridge.tied_names(model):
            for config in {
                id(c): c for c in (model.config, model.config.get_text_config())
            }.values():
                config.tie_word_embeddings = False
        bridge.leave_ties(model)

    def restore(self, model: PreTrainedModel, old: Any) -> None:
        """Put the dense head back; where the vocabulary has been resized meanwhile, resized as transformers does it."""
        vocab = bridge.vocabulary(model)
        if len(old.weight) != vocab:
            kept = old
            old = model._get_resized_lm_head(kept, vocab)
            old.train(kept.training).requires_grad_(kept.weight.requires_grad)
            _take_over_hook(old, kept)
        elif (
            getattr(old, "out_features", vocab) != vocab
        ):  # a tied matrix has grown with the embedding's
            model._adjust_bias(old, model.get_input_embeddings())
            old.out_features = vocab
        model.set_output_embeddings(old)

    def check_restore(self, old: nn.Module | None) -> None:
        if old is None:
            raise ValueError(
                "the dense head is no longer there: this model was loaded from a patched checkpoint; load the original "
                "one"
            )

    def in_fp32(self, model: PreTrainedModel, new: Head) -> set[str]:
        path, _ = bridge.find_head(model)
        return {f"{path}.{name}" for name in new.keep_in_fp32}

    def loaded(self, model: PreTrainedModel) -> None:
        head = bridge.active_head(model)
        if isinstance(head, Head):
            check_indices(head)
            head.transform = _rising_transform(model)

    def describe(self, model: PreTrainedModel, part: Part) -> tuple[Iterable[Row], list[str]]:
        head = bridge.active_head(model)
        if not isinstance(head, Head):
            return [], []
        dense = head.in_features * head.out_features
        parameters = f"{head.n_parameters:,} ({head.n_parameters / dense:.2%} of dense)"
        path, _ = bridge.find_head(model)
        notes = head.notes()
        if head.transform is None:
            notes.append(
                "logits are changed after the head in an unknown way: no loss without logits"
            )
        if head.untied:
            notes.append("the input embedding was tied to the head and is now a copy of its own")
        row = Row(path, part.value.short(), parameters, head.nbytes, head.backend)
        return [row], notes


def _rising_transform(model: PreTrainedModel) -> LogitTransform | None:
    """What the family does to its logits after the head.

    Raises:
        ValueError: it turns the largest score into the smallest logit.
    """
    transform = bridge.logit_transform(model)
    if transform is not None and not transform.rises:
        steps = ", ".join(f"{name} {value:g}" for name, value in transform.steps)
        raise ValueError(
            f"{type(model).__name__} makes smaller logits of larger scores ({steps}), but heads look for the largest "
            "scores. Negate that number in the config and the head's weight and bias, untied from the input embedding: "
            "it is the same model, and can be patched"
        )
    return transform


def _take_over_hook(new: nn.Module, old: nn.Module) -> None:
    """The hook by which accelerate places and offloads a module."""
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)


def _cast(head: Head, dtype: torch.dtype) -> None:
    """Parameters to `dtype`, but for those that the head keeps in fp32."""
    for name, parameter in head.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(
                torch.float32 if name in head.keep_in_fp32 else dtype
            )


def _check_matrix(path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the dense head can be read as numbers."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device.type == "meta":
            raise ValueError(
                f"{path}.{name} is not in memory (meta device or offloaded to disk); load the model without "
                "offloading, patch it, save it, and offload what you saved"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{path}.{name} is quantized ({tensor.dtype}); patch the head of the original model"
            )
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.split(8192))
        if bad:
            raise ValueError(
                f"{path}.{name} holds {bad} NaN or infinite values; a fit would spread them"
            )


def head_of(model: Any) -> Head | None:
    """The model's patched head, or None."""
    if model.get_output_embeddings() is None:
        return None
    head = bridge.active_head(model)
    return head if isinstance(head, Head) else None
