"""⊥Grad: an optimizer that never moves weights along themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class OrthoGrad(Optimizer):
    """Another optimizer, its gradients without their part along the weights: `g − (w·g / w·w) w`, rescaled to `‖g‖`.

    Prieto et al., 2501.04697. Scaling all weights up lowers a cross-entropy without learning anything; this removes
    that direction, per tensor. Harmless for a new head.

        optimizer = OrthoGrad(torch.optim.AdamW(model.parameters(), lr=1e-3))
    """

    def __init__(self, inner: Optimizer):
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state = inner.param_groups, inner.state  # one set, not two

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    w.grad.copy_(orthogonal(w, w.grad))
        self.inner.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


def orthogonal(weight: Tensor, gradient: Tensor) -> Tensor:
    """The part of the gradient that is orthogonal to the weight, as long as the whole gradient was."""
    w, g = weight.flatten(), gradient.flatten()
    across = g - (w @ g) / (w @ w + 1e-30) * w
    return torch.mul(across, g.norm() / (across.norm() + 1e-30)).view_as(gradient)
