"""Is a dense head no more than a matrix product, so that another head can stand for all of it?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized


@torch.no_grad()
def check_linear(path: str, head: Any) -> None:
    """Does the dense head compute `hidden @ weight.T + bias`, and nothing else?

    Raises:
        ValueError: it carries an adapter, a parametrization or a hook, or is something else; says what to do first.
    """
    if head._modules.keys() & {"base_layer", "original_module"}:  # as PEFT names what it wraps
        raise ValueError(
            f"the head {path} carries a PEFT adapter ({type(head).__name__}), which a new head would drop; merge it "
            "first: model = model.merge_and_unload(), then patch, then put new adapters on"
        )
    if is_parametrized(head):
        names = ", ".join(head.parametrizations)
        raise ValueError(
            f"the {names} of the head {path} is parametrized, which a new head would drop; merge it first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(head, {names!r})"
        )
    hooked = head._forward_pre_hooks or head._forward_hooks or "forward" in head.__dict__
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not hooked:
        return
    weight, bias = head.weight, getattr(head, "bias", None)
    noise = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
    states = noise.to(weight.device, weight.dtype)
    modes = {module: module.training for module in head.modules()}
    try:
        head.eval()
        found = head(states)
        wanted = nn.functional.linear(states, head.weight, bias)
        error = float((found.float() - wanted.float()).abs().max())
    except (RuntimeError, TypeError, ValueError, AttributeError) as why:
        error, wanted, reason = math.inf, weight, f"it cannot be called on hidden states: {why}"
    else:
        reason = f"on random states it differs from that by {error:.3g}"
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not error <= 16 * torch.finfo(weight.dtype).eps * float(wanted.abs().max()):
        raise ValueError(
            f"the head {path} ({type(head).__name__}) computes something else than hidden @ weight.T + bias, which a "
            f"new head would drop ({reason}); merge it into the weight first, or take the hook off"
        )
