"""Whether an optimizer moves a head's scales by more than they are."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_softheads.heads.forms.streamed_rows import RowsHead, rate_by_size

_MOST = 0.2  # of its size, that a parameter may change in one step; training diverges from about twice that
_SAMPLE = 1024  # numbers of a parameter that are compared
_SEEN = "_softheads_seen"


class _Seen(NamedTuple):
    """A parameter as it was in the last training call."""

    version: int
    sample: Tensor
    steps: int
    worst: Tensor  # the largest change so far, of its size; read from the device now and then
    warned: bool = False


def watch_steps(head: nn.Module | None) -> None:
    """Called in every training call of a model with this head: warns once of a step that is too large for its scales.

    Adam moves every number by about the learning rate. The scales of 8-bit codes are a few thousandths or less, so that
    a usual rate turns their signs. The changes of all steps are read after steps 1, 2, 4, 8, …: reading waits for the
    device.
    """
    if torch.compiler.is_compiling() or head is None:
        return
    for module in head.modules():
        if isinstance(module, RowsHead) and module.weight.requires_grad:
            _look(module)


def _look(head: RowsHead) -> None:
    weight: Any = getattr(head.weight, "_local_tensor", head.weight)  # of a sharded one
    seen: _Seen | None = head.__dict__.get(_SEEN)
    if seen is not None and (seen.warned or seen.version == weight._version):
        return
    sample = weight.detach().reshape(-1)[:: max(1, weight.numel() // _SAMPLE)].float().clone()
    if seen is None or seen.sample.shape != sample.shape:
        head.__dict__[_SEEN] = _Seen(weight._version, sample, 0, sample.new_zeros(()))
        return
    change = (sample - seen.sample).norm() / seen.sample.norm().clamp_min(1e-30)
    now = _Seen(weight._version, sample, seen.steps + 1, torch.maximum(seen.worst, change))
    if not now.steps & (now.steps - 1) and (worst := float(now.worst)) > _MOST:
        now = now._replace(warned=True)
        warnings.warn(
            f"one optimizer step has changed the weight of this {type(head).__name__} by {worst:.0%} of its size: "
            "training will hardly converge. An optimizer such as Adam moves each number by about the learning rate, "
            f"however small it is; about {rate_by_size(sample):.0e} would do here. Make the optimizer of "
            "hf_softheads.training.rates.parameter_groups(model, lr), or freeze the head",
            stacklevel=2,
        )
    head.__dict__[_SEEN] = now
