"""A language model's head: finding it, running the model without it, and what the family does after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_softheads.bridge.kinds import how_to_load, named
from hf_softheads.heads.base import Head, LogitTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Function = Callable[[Tensor], Tensor]


def find_head(model: PreTrainedModel) -> tuple[str, Any]:
    """Path and module of the output embedding.

    Raises:
        ValueError: the model has none (an encoder, a classifier), or it is no matrix `(V, D)`.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embedding, so there is no LM head to replace; "
            f"{how_to_load(model.config, ', or patch only its attention')}"
        )
    path = next(path for path, module in model.named_modules() if module is head)
    weight = getattr(head, "weight", torch.empty(0))
    shape = getattr(weight, "ds_shape", weight.shape)  # of a matrix that ZeRO-3 has in pieces
    if not isinstance(head, Head) and len(shape) != 2:
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


class SplitModel:
    """A causal model as two steps: tokens to last hidden states, hidden states to the model's logits.

    The hidden states are what the model's own forward hands to its head, whatever the family; the head is not run.

    Raises:
        TypeError: there is no transformers model inside `model`.
        ValueError: the model has no head, or changes its logits after the head in an unknown way.
    """

    def __init__(self, model: nn.Module):
        transformers_model(model)
        self.model = model
        head = active_head(model)
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output embedding; {how_to_load(base_model(model).config)}"
            )
        self.head = head
        transform = head.transform if isinstance(head, Head) else logit_transform(base_model(model))
        if transform is None:
            raise ValueError(
                f"{type(base_model(model)).__name__} changes its logits after its head by something else than scaling "
                "and tanh; its distribution cannot be computed from hidden states"
            )
        self.transform = transform
        self.vocab: int = _vocab(head)

    def hidden(self, **inputs: Any) -> Tensor:
        """Hidden states `(B, T, D)` of a batch, with gradients where they are enabled."""
        captured: list[Tensor] = []

        def capture(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            captured.append(hidden)
            return hidden[..., :1]  # cheap, and enough for what a family does to its logits

        with head_as(self.model, capture):
            self.model(**inputs, use_cache=False)
        return captured[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits `(…, V)` in fp32, computed in the model's dtype."""
        return self.transform(self.head(hidden).float())


def _vocab(head: Any) -> int:
    return getattr(head, "out_features", None) or len(head.weight)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also inside a composite one."""
    return base_model(model).config.get_text_config()


def logit_transform(model: PreTrainedModel) -> LogitTransform | None:
    """What the model does to the scores after its head, found by running its own forward on a stand-in.

    The backbone is replaced by a stub for the call, so nothing is computed and meta tensors will do. None when the
    model does something else than scaling and tanh.
    """
    from transformers import PreTrainedModel

    path, head = find_head(model)
    width = getattr(head, "in_features", None) or head.weight.shape[-1]
    device = _execution_device(head)
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


def _execution_device(head: Any) -> Any:
    """Where a head computes: of one that is offloaded, not where its parameters are."""
    device = head.weight.device
    hook = getattr(head, "_hf_hook", None)
    if device.type != "meta" or hook is None:
        return device
    return getattr(hook, "execution_device", None) or "cpu"


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


def base_model(model: nn.Module) -> Any:
    """The transformers model inside DDP, `torch.compile` and PEFT wrappers."""
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def transformers_model(model: Any) -> Any:
    """The transformers model inside any wrapper.

    Raises:
        TypeError: there is none; says what was given and what would work.
    """
    from transformers import PreTrainedModel

    if isinstance(model, str | os.PathLike):
        raise TypeError(f"expected a loaded transformers model, got {named(model)}")
    inner = base_model(model) if isinstance(model, nn.Module) else model
    if isinstance(inner, PreTrainedModel):
        return inner
    within = getattr(model, "model", None)
    hint = ""
    if isinstance(model, type):
        hint = f" (the class {model.__name__} itself); give an instance"
    elif isinstance(within, PreTrainedModel):
        hint = "; give the model inside it: its attribute .model"
    raise TypeError(f"expected a transformers model, got {type(model).__name__}{hint}")


def output_head(model: nn.Module) -> nn.Module:
    """The output embedding that will run; a module that is no language model is taken as a head itself.

    Raises:
        ValueError: the model has no output embedding.
    """
    from transformers import PreTrainedModel

    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        return model
    head: nn.Module | None = active_head(base)
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no output embedding, so there are no logits to compute a loss from; "
            f"{how_to_load(base.config)}"
        )
    return head


def vocabulary(model_or_matrix: nn.Module | Tensor) -> int:
    """How many tokens a model, a head module or a matrix `(V, D)` scores."""
    if isinstance(model_or_matrix, Tensor):
        return len(model_or_matrix)
    return _vocab(output_head(model_or_matrix))


@contextlib.contextmanager
def head_as(model: nn.Module, function: Function) -> Iterator[Function]:
    """Within the context the head computes `function(hidden)`, between its own hooks; gives the head's own forward."""
    head = output_head(model)
    own = head.__dict__.get("forward")
    original: Function = head.forward
    head.__dict__["forward"] = function
    try:
        yield original
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own


@torch.no_grad()
def check_transform(model: nn.Module, transform: LogitTransform, batch: Mapping[str, Any]) -> Any:
    """Compare the head's scores after `transform` with the model's own logits on a few tokens; its output on them.

    Raises:
        ValueError: they differ.
    """
    base = base_model(model)
    raw: list[Tensor] = []

    def own(hidden: Tensor) -> Tensor:
        raw.append(original(hidden))
        return raw[-1]

    training = base.training
    base.eval()
    try:
        # with its wrappers, which gather sharded parameters; but nothing is compiled for so few tokens
        with head_as(model, own) as original:
            output = getattr(model, "_orig_mod", model)(**batch, use_cache=False)
    finally:
        base.train(training)
    logits, expected = output.logits.float(), transform(raw[0].float())
    error = float((logits - expected).abs().max())
    if not error <= 1e-2 * float(expected.abs().max()) + 1e-4:
        raise ValueError(
            f"the logits of {type(base).__name__} differ by {error:.3g} from its head's scores after "
            f"{transform}: it does something after its head (a hook on the head counts too) that is not understood, so "
            "a loss computed from hidden states would be wrong"
        )
    return output
