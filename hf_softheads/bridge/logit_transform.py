"""What a family does to its logits after its head, found by watching its own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_softheads.bridge.heads import find_head
from hf_softheads.heads.base import LogitTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return scores

    def after_its_hooks(_: Any, __: Any, out: Any) -> None:
        recorder.follow(out, [])

    scores = torch.ones(
        1,
        1,
        head.out_features if hasattr(head, "out_features") else len(head.weight),
        device=device,
    )
    output = _AnyOutput(hidden)
    forwards = {module: module.__dict__.get("forward") for module in [*stubbed, head]}
    training = model.training
    last = head.register_forward_hook(after_its_hooks)
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
        last.remove()
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
