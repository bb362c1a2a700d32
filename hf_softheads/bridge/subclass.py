"""The class of a patched model: a subclass of its own, with the same name and module, as FSDP2 makes them."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_softheads import files
from hf_softheads.attention.base import AttentionVariant
from hf_softheads.bridge.attention import IMPLEMENTATION, register, showing
from hf_softheads.bridge.classifiers import active_classifier, pooling
from hf_softheads.bridge.embeddings import bind_rows
from hf_softheads.bridge.family_loss import IGNORE, asks_for_loss, targets_of, without_logits
from hf_softheads.bridge.fused_head import answered, theirs
from hf_softheads.bridge.generation import with_forgotten
from hf_softheads.bridge.head_weight import guard_again, guard_weight
from hf_softheads.bridge.heads import active_head, is_hooked
from hf_softheads.bridge.hidden import CHILD, prepare_cache
from hf_softheads.bridge.loading import check_complete
from hf_softheads.bridge.step_size import watch_steps
from hf_softheads.bridge.ties import without_heads
from hf_softheads.classifiers.base import PooledClassifier
from hf_softheads.embeddings.head_rows import RowsEmbedding, RowsTwin
from hf_softheads.heads.base import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CALL = "_softheads_call"  # the labels of a call whose loss the head computes


class Patched(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Methods that a patched model's class gains. Never instantiated by itself; see `subclass_patched`."""

    _adopted_from: Any  # a class; transformers evaluates the annotations of its models
    _adopted_outer: bool
    _asks_for_loss: bool

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Head | AttentionVariant | PooledClassifier):
            with torch._C.DisableTorchFunctionSubclass():  # so that no guard objects
                super()._init_weights(module)  # an embedding may have buffers of its family
        if isinstance(module, Head | AttentionVariant | PooledClassifier | RowsEmbedding):
            module.reset_parameters()

    @property
    def _tied_weights_keys(self) -> Any:
        """The family's ties less those of a new head: `config.tie_word_embeddings` speaks for all of them at once."""
        ties = self.__dict__.get("_tied_weights_keys", self._adopted_from._tied_weights_keys)
        return without_heads(self, ties) if isinstance(ties, dict) else ties

    @_tied_weights_keys.setter
    def _tied_weights_keys(self, value: Any) -> None:
        self.__dict__["_tied_weights_keys"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        # a library gives this model a forward of its own
        super().__setattr__(name, answered(self, value) if name == "forward" else value)

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        guard_weight(new_embeddings)
        tables = [(m, m.weight) for m in self.modules() if isinstance(m, nn.Embedding)]
        super().set_output_embeddings(new_embeddings)
        for module, weight in tables if isinstance(new_embeddings, Head) else ():
            if module.weight is not weight:  # T5Gemma puts the head's there, whatever it is
                module.weight, module.num_embeddings = weight, len(weight)

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

    def _adjust_missing_and_unexpected_keys(self, *args: Any, **kwargs: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(*args, **kwargs)
        for found in (*args, *kwargs.values()):
            check_complete(self, getattr(found, "missing_keys", ()))

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        done = super()._prepare_cache_for_generation(*args, **kwargs)
        prepare_cache(self, *args, **kwargs)
        return done

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        head = self.get_output_embeddings()
        if isinstance(head, Head) and new_num_tokens and type(head).resize is Head.resize:
            head.resize(new_num_tokens)  # raises, before the input embedding has changed
        before = self.get_input_embeddings().weight.shape[0]
        every = self.named_modules(remove_duplicate=False)
        twins = {path: module for path, module in every if isinstance(module, RowsTwin)}
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        rows = embedding.weight.shape[0]
        left = isinstance(head, Head) and self.get_output_embeddings() is head and rows != before
        if left and self.config.get_text_config().tie_word_embeddings:
            # Marian leaves the head to its tie, of which the new one has none
            self.set_output_embeddings(_resized(head, rows))
        for path, twin in twins.items():  # a family puts one module everywhere
            self.set_submodule(path, twin)
        bind_rows(self)
        return embedding

    def _get_resized_embeddings(
        self,
        old_embeddings: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(old_embeddings, RowsEmbedding):
            step = pad_to_multiple_of or 1
            rows = len(old_embeddings.weight) if new_num_tokens is None else new_num_tokens
            return old_embeddings.resize(-(-rows // step) * step)
        return super()._get_resized_embeddings(
            old_embeddings, new_num_tokens, pad_to_multiple_of, *args, **kwargs
        )

    def _get_resized_lm_head(
        self, old_lm_head: nn.Module, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(old_lm_head, Head) and new_num_tokens:
            return _resized(old_lm_head, new_num_tokens)
        return super()._get_resized_lm_head(old_lm_head, new_num_tokens, *args, **kwargs)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """As the family's own, but nothing in the folder is replaced until everything is written.

        Not so when it also uploads or writes a distributed checkpoint: transformers needs the folder itself for these.
        """
        itself = args[1:] or kwargs.get("push_to_hub") or kwargs.get("distributed_checkpoint")
        if itself or not is_main_process or os.path.isfile(save_directory):
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        with files.filling(Path(save_directory)) as fresh:
            result = super().save_pretrained(fresh, is_main_process, *args, **kwargs)
            files.remove_other_shards(Path(save_directory), {path.name for path in fresh.iterdir()})
        return result

    def _extract_generation_mode_kwargs(self, custom_generate: Any, *args: Any) -> Any:
        """As transformers', which forgets streamer and tokenizer where `custom_generate` is a function."""
        return with_forgotten(super()._extract_generation_mode_kwargs, custom_generate, *args)

    @property
    def loss_function(self) -> Any:
        head, call = active_head(self), getattr(self, _CALL, None)
        if isinstance(head, Head) and head.nll is not None and call is not None:
            return functools.partial(_loss_from_head, head, call)
        return super().loss_function

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        bind_rows(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._adopted_from, self._adopted_outer, self._asks_for_loss), self.__dict__


def _resized(head: Head, vocab: int) -> Head:
    new = head.resize(vocab)
    new.untied = head.untied
    new.use_kernels(head.kernels)
    return new.train(head.training)


def subclass_patched(model: PreTrainedModel) -> None:
    """Give the model, and every model inside it, a class with `Patched`'s methods. The outer one's forward is wrapped
    so that training with labels computes the loss inside the head, without logits."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, Patched):
            module.__class__ = _adopted(module.__class__, module is model, asks_for_loss(module))
    if "forward" in model.__dict__:
        model.forward = model.__dict__["forward"]  # given before the patch: see `answered`
    guard_again(model)  # a checkpoint's parameters take the place of those that were built
    if guard_again not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(guard_again)


def restore_class(model: PreTrainedModel) -> None:
    """Give the original classes back."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is guard_again:
            del model._forward_pre_hooks[key]
    for module in model.modules():
        if isinstance(module, Patched):
            module.__class__ = module._adopted_from
            if "forward" in module.__dict__:
                module.forward = theirs(module.__dict__["forward"])


@functools.cache
def _adopted(cls: Any, outer: bool, asks: bool) -> Any:
    register()  # here, because a model that is unpickled comes by no other way
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_adopted_from": cls,
        "_adopted_outer": outer,
        "_asks_for_loss": asks,
    }
    if outer:
        members["forward"] = _fused_forward(cls.forward)
    return type(cls.__name__, (Patched, cls), members)


def _blank(cls: Any, outer: bool, asks: bool) -> Any:
    adopted = _adopted(cls, outer, asks)
    return adopted.__new__(adopted)


def _fused_forward(original: Any) -> Any:
    """The family's own forward; in training with labels the head returns `-log p(label)` where logits would be, and
    with `output_attentions` every layer returns its weights."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            watch_steps(active_head(self))
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
        call = _fusable(self, kwargs, ForCausalLMLoss)
        if call is None:
            return original(self, *args, **kwargs)
        head: Any = active_head(self)
        head.targets = call.targets
        setattr(self, _CALL, call)
        try:
            output = original(self, *args, **kwargs)
            if (
                head.targets is not None
            ):  # the head saw other positions than the labels': it gave logits
                return output
            if head.nll is None:
                return without_logits(output, output[0])
        except _OtherLoss:
            pass
        finally:
            head.targets = head.nll = None
            delattr(self, _CALL)
        return original(self, *args, **kwargs)

    return forward


class _Call(NamedTuple):
    """The labels of one call whose loss the head computes."""

    labels: Tensor
    shift_labels: Tensor | None
    ignore_index: int
    targets: Tensor  # (B, T), -100 where nothing is to be predicted


class _OtherLoss(Exception):
    """The family wants another loss than the head has computed."""


def _fusable(model: Any, kwargs: dict[str, Any], usual: Any) -> _Call | None:
    """The call's labels, or None when the loss must come from real logits: it is not transformers' usual one."""
    labels = kwargs.get("labels")
    if labels is None or not model.training or kwargs.get("logits_to_keep"):
        return None
    head = active_head(model)
    if (
        not isinstance(head, Head)
        or is_hooked(head)
        or head.transform is None
        or model.loss_function is not usual
        or not model._asks_for_loss
    ):
        return None
    shift_labels, ignore_index = kwargs.get("shift_labels"), kwargs.get("ignore_index", IGNORE)
    targets = targets_of(model, labels, shift_labels, ignore_index)
    return _Call(labels, shift_labels, ignore_index, targets)


def _loss_from_head(
    head: Head,
    call: _Call,
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """`ForCausalLMLoss` from what the head has computed: the mean over the labelled tokens, or the sum over
    `num_items_in_batch`; 0 if none.

    Raises:
        _OtherLoss: the family asks for it with other labels than the head was given.
    """
    nll, head.nll = head.nll, None
    assert nll is not None
    assert head.counted is not None
    trusted = (
        labels is call.labels
        and shift_labels is call.shift_labels
        and ignore_index == call.ignore_index
        and call.targets is not call.labels
    )
    if not trusted:
        wanted = shift_labels
        if wanted is None and labels is not None:
            wanted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if wanted is not None and ignore_index != IGNORE:
            wanted = wanted.masked_fill(wanted == ignore_index, IGNORE)
        if wanted is None or not _equal(wanted, call.targets):
            raise _OtherLoss
    items = head.counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return nll.sum() / (items.to(nll.device) if isinstance(items, Tensor) else items)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b.to(a.device)))
