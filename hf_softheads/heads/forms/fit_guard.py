"""What every fit is checked for before it changes anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Fit = Callable[..., None]


def checked(fit: Fit) -> Fit:
    """`fit` of a spec, refusing a module that the spec did not build and a bias of another length.

    Raises:
        ValueError: says what was given and how the right module is built.
    """

    @functools.wraps(fit)
    def checked_fit(
        self: Any, head: Any, weight: Tensor, bias: Tensor | None, stats: Any = None
    ) -> None:
        vocab, dim = weight.shape
        self.check(dim, vocab)
        with torch.device("meta"):
            own = self.module(dim, vocab, bias=bias is not None)
        wanted, given = _shapes(own), _shapes(head)
        if type(own) is not type(head) or wanted != given:
            odd = sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n))
            differs = f"; they differ in {', '.join(odd[-3:])}" if type(own) is type(head) else ""
            raise ValueError(
                f"{self} fits a {type(own).__name__} for a matrix {(vocab, dim)}, not this "
                f"{type(head).__name__}{differs}. Build it by spec.module({dim}, {vocab}, "
                f"bias={bias is not None}), or let sh.patch do both"
            )
        fit(self, head, weight, bias, stats)

    return checked_fit


def _shapes(module: Any) -> dict[str, tuple[int, ...]]:
    found = {name: tuple(t.shape) for name, t in module.state_dict(keep_vars=True).items()}
    return {**found, "size": (module.out_features, module.in_features)}
