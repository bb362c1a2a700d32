"""Learning rates that suit the parameters of a patched head."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_softheads.heads.forms.streamed_rows import RowsHead, rate_by_size


def parameter_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """What a model trains, for an optimizer such as Adam: `torch.optim.AdamW(parameter_groups(model, 1e-3))`.

    Adam moves every number by about the rate, whatever its size. What a head multiplies its codes by, a thousandth or
    less at 8 bits, gets a hundredth of its own size where that is lower than `lr`; all else gets `lr`.
    """
    fitting = {
        id(head.weight): min(lr, rate_by_size(head.weight))
        for head in model.modules()
        if isinstance(head, RowsHead)
    }
    by_rate: dict[float, list[nn.Parameter]] = {lr: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_rate.setdefault(fitting.get(id(parameter), lr), []).append(parameter)
    return [{"params": params, "lr": rate} for rate, params in by_rate.items() if params]
