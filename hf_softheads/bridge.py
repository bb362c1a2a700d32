"""The only file that knows the inside of transformers: attention and mask registration, layers, heads, loss.

Nothing is assigned into a transformers class. A patched model gets a subclass of its own class with the same name and
module (as FSDP2 does), so that `architectures`, conversion mappings and signatures stay what they were.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hf_softheads.attention.base import AttentionVariant, Geometry, Inputs, run
from hf_softheads.attention.blocked import AttentionMap, Observer
from hf_softheads.attention.learned_sink import LearnedSink
from hf_softheads.attention.softmax import Softmax
from hf_softheads.heads.base import Head, LogitTransform

IMPLEMENTATION = "hf_softheads"  # the attention implementation, also the marker in config.json
_OBSERVER = "softheads_observer"
_HIDDEN = "softheads_hidden"
CHILD = "softheads"  # the attention layers' child module that holds a variant and its parameters


# -- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every attention layer: query `(B,H,Q,D)` to `(B,Q,H,Dv)`.

    A layer without a variant computes ordinary softmax attention, with the layer's soft cap and sinks. The second value
    is the attention map where `output_attentions` asks for it.

    Raises:
        NotImplementedError: the layer has sinks and its variant has none.
    """
    variant = getattr(module, CHILD, None)
    sinks = kwargs.get("s_aux")
    if sinks is not None and variant is not None and not variant.spec.takes_sinks:
        raise NotImplementedError(
            f"{type(module).__name__} has learned attention sinks (s_aux), which {variant.spec.name} would ignore; "
            "patch it with `learned_sink`, which starts from them"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    keep, bias = visible(attention_mask, query, key, causal)
    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    if keep is None and causal and key.shape[2] > query.shape[2] > 1:
        # a static cache being filled: the mask is implied and only the first Q entries are written
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        keep=keep,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        bias=bias,
        hidden=getattr(module, _HIDDEN, None),
        causal=causal,
        dropout=dropout if module.training else 0.0,
        observe=getattr(module, _OBSERVER, None),
    )
    shown = None
    if _wants_weights(module, kwargs):
        shown = AttentionMap()
        inputs = inputs.but(observe=shown)
    if inputs.hidden is not None:
        setattr(module, _HIDDEN, None)
    if variant is None:
        out = (
            run(Softmax(), {}, inputs)
            if sinks is None
            else run(LearnedSink(), {"sinks": sinks}, inputs)
        )
    else:
        probe = getattr(variant, "probe", None)
        if probe is not None:
            probe.append({name for name, given in kwargs.items() if given is not None})
        out = variant(inputs)
    return out.transpose(1, 2).contiguous(), None if shown is None else shown.whole


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked)


def visible(
    mask: Tensor | None, query: Tensor, key: Tensor, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`(keep, bias)` from any mask a model may pass: None, boolean, or additive (`finfo.min` means hidden).

    `keep` None means causal with offset `K − Q`, which for one query is everything.
    """
    if mask is None:
        if causal:
            return None, None
        return torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device), None
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return mask, None
    keep = mask > torch.finfo(mask.dtype).min / 2
    return keep, mask.masked_fill(~keep, 0.0)


def show_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention layer: keeps the layer's input for `attention_forward`, in the same call."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    setattr(module, _HIDDEN, hidden)


@contextlib.contextmanager
def observed(model: PreTrainedModel, observers: Mapping[int, Observer]) -> Iterator[None]:
    """Inside, every attention layer shows its weights to the observer of its index, patched or not.

    Raises:
        ValueError: the family computes its attention itself.
    """
    layers = attention_layers(model)
    if not layers or not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) computes its attention itself instead of through "
            "transformers' attention interface, so its weights cannot be seen"
        )
    before = model.config._attn_implementation
    try:
        for index, observer in observers.items():
            setattr(layers[index][1], _OBSERVER, observer)
        if before != IMPLEMENTATION:
            model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        for index in observers:
            layers[index][1].__dict__.pop(_OBSERVER, None)
        if before != IMPLEMENTATION:
            model.set_attn_implementation(before)


def take_sinks(module: nn.Module, variant: AttentionVariant) -> None:
    """Start a variant that takes them from the attention sinks `(H,)` that the layer was trained with."""
    sinks = getattr(module, "sinks", None)
    if variant.spec.takes_sinks and isinstance(sinks, Tensor):
        with torch.no_grad():
            variant.get_parameter("sinks").copy_(sinks)


def forget_hidden(module: nn.Module) -> None:
    """Take `show_hidden` off again."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is show_hidden:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module.__dict__.pop(_HIDDEN, None)


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attention_layers(model: nn.Module) -> dict[int, tuple[str, Any]]:
    """`{index: (path, module)}` of the self-attention layers that call the attention interface, in order."""
    found: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        if not _calls_interface(module.__class__) or getattr(module, "is_cross_attention", False):
            continue
        if "cross" in path.rpartition(".")[2].lower():
            continue
        index = getattr(module, "layer_idx", None)
        found[len(found) if index is None or index in found else index] = (path, module)
    return dict(sorted(found.items()))


@functools.cache
def _calls_interface(cls: Any) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


def geometry(model: PreTrainedModel, index: int, module: Any) -> Geometry:
    """Heads, sizes and index of one attention layer, as a variant's parameters need them.

    Raises:
        ValueError: the layer's configuration does not say.
    """
    config = getattr(module, "config", None) or model.config
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if heads is None or hidden is None:
        raise ValueError(
            f"{type(model).__name__} does not say its number of heads and hidden size in its config; "
            "the geometry that the variant's parameters need is unknown"
        )
    return Geometry(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(module, "head_dim", None)
        or getattr(config, "head_dim", None)
        or hidden // heads,
        hidden_size=hidden,
        layer_idx=index,
    )


# -- head ------------------------------------------------------------------------------------------------------------


def find_head(model: PreTrainedModel) -> tuple[str, Any]:
    """Path and module of the output embedding.

    Raises:
        ValueError: the model has none (an encoder, a classifier), or it is no matrix `(V, D)`.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding, so there is no LM head to replace; load it with "
            "AutoModelForCausalLM, or patch only its attention"
        )
    path = next(path for path, module in model.named_modules() if module is head)
    if not isinstance(head, Head) and getattr(head, "weight", torch.empty(0)).ndim != 2:
        raise ValueError(f"the head {path} ({type(head).__name__}) is not a matrix (V, D)")
    return path, head


def active_head(model: Any) -> Any:
    """The output embedding that will run: PEFT's `modules_to_save` copy where one is active."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    active = (
        None
        if head.disable_adapters
        else next((a for a in head.active_adapters if a in copies), None)
    )
    return copies[active] if active else head.original_module


class Reader:
    """A causal model as two steps: tokens to last hidden states, hidden states to the model's logits.

    The hidden states are what the model's own forward hands to its head, whatever the family; the head is not run.

    Raises:
        ValueError: the model has no head, or changes its logits after the head in an unknown way.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        head = active_head(model)
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output embedding; load it with AutoModelForCausalLM"
            )
        self.head = head
        transform = head.transform if isinstance(head, Head) else logit_transform(_inner(model))
        if transform is None:
            raise ValueError(
                f"{type(_inner(model)).__name__} changes its logits after its head by something else than scaling and "
                "tanh; its distribution cannot be computed from hidden states"
            )
        self.transform = transform
        self.vocab: int = _vocab(head)

    def hidden(self, **inputs: Any) -> Tensor:
        """Hidden states `(B, T, D)` of a batch, with gradients where they are enabled."""
        captured: list[Tensor] = []

        def capture(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            captured.append(hidden)
            return hidden[..., :1]  # cheap, and enough for what a family does to its logits

        own = self.head.__dict__.get("forward")
        self.head.forward = capture
        try:
            self.model(**inputs, use_cache=False)
        finally:
            if own is None:
                del self.head.forward
            else:
                self.head.forward = own
        return captured[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits `(…, V)` in fp32, computed in the model's dtype."""
        return self.transform(self.head(hidden).float())


def _vocab(head: Any) -> int:
    return getattr(head, "out_features", None) or len(head.weight)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a composite one."""
    return _inner(model).config.get_text_config()


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    """What the model does to the scores after its head, found by running its own forward on a stand-in.

    The backbone is replaced by a stub for the call, so nothing is computed and meta tensors will do. None when the
    model does something else than scaling and tanh.
    """
    path, head = find_head(model)
    width = getattr(head, "in_features", None) or head.weight.shape[-1]
    device = head.weight.device
    hidden = torch.zeros(1, 1, width, device=device, dtype=head.weight.dtype)
    stubbed = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    recorder = _Recorder()

    def run_head(*_: Any, **__: Any) -> Tensor:
        recorder.follow(scores, [])
        return scores

    scores = torch.ones(
        1,
        1,
        head.out_features if hasattr(head, "out_features") else len(head.weight),
        device=device,
    )
    output = _AnyOutput(hidden)
    forwards = {module: module.__dict__.get("forward") for module in [*stubbed, head]}
    training = model.training
    try:
        model.training = False
        for module in stubbed:
            module.forward = lambda *_, **__: output
        head.forward = run_head
        with torch.no_grad(), recorder:
            result = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__}.forward could not be traced to see what it does after its head {path}: {error}"
        ) from error
    finally:
        model.training = training
        for module in model.modules():
            if hasattr(module, "reshard"):  # FSDP2
                module.reshard()  # else an optimizer made now would hold the gathered parameters
        for module, forward in forwards.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    return recorder.transform(result.logits)


class _AnyOutput:
    """A backbone's output: the last hidden state, and None for whatever else a family asks for."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else ()


class _Recorder(TorchFunctionMode):
    """Writes down the element-wise operations between the head's output and the logits."""

    _SAME = ("to", "float", "type", "contiguous", "getitem", "clone", "detach")

    def __init__(self) -> None:
        super().__init__()
        self._steps: dict[int, list[tuple[str, float]] | None] = {}
        self._alive: list[Tensor] = []  # ids are unique only while their tensors live

    def follow(self, tensor: Tensor, steps: list[tuple[str, float]] | None) -> None:
        self._steps[id(tensor)] = steps
        self._alive.append(tensor)

    def transform(self, logits: Tensor) -> LogitTransform | None:
        steps = self._steps.get(id(logits))
        return None if steps is None else LogitTransform(tuple(steps))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = next((a for a in args if isinstance(a, Tensor) and id(a) in self._steps), None)
        if source is not None and isinstance(result, Tensor):
            known, step = (
                self._steps[id(source)],
                self._step(func.__name__.strip("_"), source, args),
            )
            if known is None or step is None or result.shape != source.shape:
                self.follow(result, None)
            else:
                self.follow(result, known + step)
        return result

    def _step(self, name: str, source: Tensor, args: Any) -> list[tuple[str, float]] | None:
        """What one call adds to the chain, or None when it is not understood."""
        if name in self._SAME:
            return []
        if name == "tanh":
            return [("tanh", 1.0)]
        if name in ("mul", "imul", "rmul", "div", "truediv", "itruediv") and len(args) == 2:
            other = args[1] if args[0] is source else args[0]
            if not isinstance(other, Tensor) or other.numel() == 1:
                return [("div" if "div" in name else "mul", float(other))]
        return None


# -- the model's class -------------------------------------------------------------------------------------------------


class Adopted(PreTrainedModel if TYPE_CHECKING else object):  # type: ignore[misc]
    """Methods that a patched model's class gains. Never instantiated by itself; see `adopt`."""

    _adopted_from: type[PreTrainedModel]
    _adopted_outer: bool

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Head | AttentionVariant):
            module.reset_parameters()
        else:
            super()._init_weights(module)

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


def adopt(model: PreTrainedModel) -> None:
    """Give the model, and every model inside it, a class with `Adopted`'s methods. The outer one's forward is wrapped
    so that training with labels computes the loss inside the head, without logits."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not isinstance(module, Adopted):
            module.__class__ = _adopted(module.__class__, module is model)


def disown(model: PreTrainedModel) -> None:
    """Give the original classes back."""
    for module in model.modules():
        if isinstance(module, Adopted):
            module.__class__ = module._adopted_from


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
    return type(cls.__name__, (Adopted, cls), members)


def _blank(cls: Any, outer: bool) -> Any:
    adopted = _adopted(cls, outer)
    return adopted.__new__(adopted)


# -- the loss inside the head ------------------------------------------------------------------------------------------


def _fused_forward(original: Any) -> Any:
    """The family's own forward; in training with labels the head returns `-log p(label)` where logits would be."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
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
