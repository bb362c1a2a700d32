"""The class of a patched model: a subclass of its own, with the same name and module, as FSDP2 makes them."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_softheads.attention.base import AttentionVariant
from hf_softheads.bridge.attention import IMPLEMENTATION, showing
from hf_softheads.bridge.classifiers import active_classifier, pooling
from hf_softheads.bridge.fused_head import answered, theirs
from hf_softheads.bridge.head_weight import guard_weight
from hf_softheads.bridge.heads import active_head
from hf_softheads.bridge.hidden import CHILD
from hf_softheads.classifiers.base import PooledClassifier
from hf_softheads.heads.base import Head


class Patched(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Methods that a patched model's class gains. Never instantiated by itself; see `subclass_patched`."""

    _adopted_from: type[PreTrainedModel]
    _adopted_outer: bool

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Head | AttentionVariant | PooledClassifier):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def __setattr__(self, name: str, value: Any) -> None:
        # a library gives this model a forward of its own
        super().__setattr__(name, answered(self, value) if name == "forward" else value)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        guard_weight(new_embeddings)
        super().set_output_embeddings(new_embeddings)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        wanted = attn_implementation
        names = wanted.values() if isinstance(wanted, dict) else [wanted]
        patched = any(CHILD in dict(m.named_children()) for m in self.modules())
        if patched and any(name != IMPLEMENTATION for name in names):
            raise ValueError(
                f"this model's attention is patched by hf_softheads; {wanted!r} would silently compute ordinary "
                "softmax attention. Call hf_softheads.unpatch(model) first"
            )
        super().set_attn_implementation(wanted, *args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        head = self.get_output_embeddings()
        if isinstance(head, Head) and new_num_tokens and type(head).resize is Head.resize:
            head.resize(new_num_tokens)  # raises, before the input embedding has changed
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _get_resized_lm_head(
        self, old_lm_head: nn.Module, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(old_lm_head, Head) and new_num_tokens:
            return old_lm_head.resize(new_num_tokens)
        return super()._get_resized_lm_head(old_lm_head, new_num_tokens, *args, **kwargs)

    @property
    def loss_function(self) -> Any:
        head = active_head(self)
        if isinstance(head, Head) and head.nll is not None:
            return functools.partial(_loss_from_head, head)
        return super().loss_function

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._adopted_from, self._adopted_outer), self.__dict__


def subclass_patched(model: PreTrainedModel) -> None:
    """Give the model, and every model inside it, a class with `Patched`'s methods. The outer one's forward is wrapped
    so that training with labels computes the loss inside the head, without logits."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, Patched):
            module.__class__ = _adopted(module.__class__, module is model)
    if "forward" in model.__dict__:
        model.forward = model.__dict__["forward"]  # given before the patch: see `answered`
    guard_weight(
        model.get_output_embeddings()
    )  # a checkpoint's parameters take the place of those that were built


def restore_class(model: PreTrainedModel) -> None:
    """Give the original classes back."""
    for module in model.modules():
        if isinstance(module, Patched):
            module.__class__ = module._adopted_from
            if "forward" in module.__dict__:
                module.forward = theirs(module.__dict__["forward"])


@functools.cache
def _adopted(cls: Any, outer: bool) -> Any:
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_adopted_from": cls,
        "_adopted_outer": outer,
    }
    if outer:
        members["forward"] = _fused_forward(cls.forward)
    return type(cls.__name__, (Patched, cls), members)


def _blank(cls: Any, outer: bool) -> Any:
    adopted = _adopted(cls, outer)
    return adopted.__new__(adopted)


def _fused_forward(original: Any) -> Any:
    """The family's own forward; in training with labels the head returns `-log p(label)` where logits would be, and
    with `output_attentions` every layer returns its weights."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        classifier = active_classifier(self)
        if classifier is None and not kwargs.get("output_attentions"):
            return without_maps(self, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            if classifier is not None:
                stack.enter_context(pooling(self, classifier))
            if kwargs.get("output_attentions"):
                stack.enter_context(showing(self))
            return without_maps(self, *args, **kwargs)

    def without_maps(self: Any, *args: Any, **kwargs: Any) -> Any:
        targets = _targets(self, kwargs)
        if targets is None:
            return original(self, *args, **kwargs)
        head: Any = active_head(self)
        head.targets = targets
        try:
            output = original(self, *args, **kwargs)
            used = head.targets is None and head.nll is None
        finally:
            head.targets = head.nll = None
        # a class that never asks for `loss_function` computed something else from the stand-in: run it plainly
        return _without_logits(output) if used else original(self, *args, **kwargs)

    return forward


def _targets(model: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Labels shifted by one, or None when the loss must come from real logits."""
    labels = kwargs.get("labels")
    if labels is None or not model.training or kwargs.get("logits_to_keep"):
        return None
    head = active_head(model)
    if (
        not isinstance(head, Head)
        or head.transform is None
        or model.loss_function is not ForCausalLMLoss
    ):
        return None
    shifted: Tensor | None = kwargs.get("shift_labels")
    return nn.functional.pad(labels, (0, 1), value=-100)[..., 1:] if shifted is None else shifted


def _loss_from_head(head: Head, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
    """Mean over the labelled tokens, or the sum over `num_items_in_batch` as transformers defines it; 0 if none."""
    assert head.nll is not None
    assert head.counted is not None
    nll, head.nll = head.nll, None
    items = head.counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return nll.sum() / (items.to(nll.device) if isinstance(items, Tensor) else items)


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):  # (loss, logits, …)
        return (output[0], None, *output[2:])
    return type(output)(**{name: value for name, value in output.items() if name != "logits"})
