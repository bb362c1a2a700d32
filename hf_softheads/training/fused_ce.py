"""Other packages' fused cross-entropies of a dense head, as exact as this one's where they are let in."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads.registry import did_you_mean
from hf_softheads.training.token_chunks import Scorer


class Backend(NamedTuple):
    """`total(hidden (n, D), labels (n,), head)` is the sum over tokens, differentiable; `refusal` says why it is not
    exact or not possible there, or None."""

    total: Callable[[Tensor, Tensor, Scorer], Tensor]
    refusal: Callable[[Tensor, Scorer], str | None]
    package: str
    install: str


def backend(name: str) -> Backend:
    """
    Raises:
        ValueError: no backend of this name.
        ImportError: it is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; {did_you_mean(name, BACKENDS)}")
    found = BACKENDS[name]
    missing = not importlib.util.find_spec(found.package)
    if missing or (name == "torch" and not hasattr(F, "linear_cross_entropy")):
        raise ImportError(
            f"the backend {name!r} needs `pip install {found.install}`; without a backend the "
            "Objective computes the same by itself"
        )
    return found


def fused_total(name: str, hidden: Tensor, labels: Tensor, head: Scorer | None) -> Tensor:
    """The sum of the cross-entropies, fp32.

    Raises:
        ValueError: this head or dtype is not for that backend.
    """
    chosen = backend(name)
    if head is None:
        why: str | None = "the head is no plain matrix"
    elif head.transform.steps:
        why = f"the model changes its scores ({head.transform})"
    else:
        why = chosen.refusal(hidden, head)
    if why is not None or head is None:
        raise ValueError(
            f"the backend {name!r} cannot compute this loss: {why}; leave `backend` out"
        )
    return chosen.total(hidden, labels, head).float()


def _torch(hidden: Tensor, labels: Tensor, head: Scorer) -> Tensor:
    return F.linear_cross_entropy(  # type: ignore[no-any-return, attr-defined, unused-ignore]
        hidden, head.weight, labels, linear_bias=head.bias, reduction="sum"
    )


def _torch_refusal(hidden: Tensor, head: Scorer) -> str | None:
    if hidden.dtype in (torch.bfloat16, torch.float16):
        return f"torch rounds the loss itself to {hidden.dtype}, up to a percent off"
    return None


def _liger(hidden: Tensor, labels: Tensor, head: Scorer) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(  # type: ignore[no-any-return]
        hidden, head.weight, labels, head.bias, reduction="sum", accum_dtype=torch.float32
    )


def _liger_refusal(hidden: Tensor, head: Scorer) -> str | None:
    if hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels are Triton's and need an accelerator"
    return None


def _cce(hidden: Tensor, labels: Tensor, head: Scorer) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    how = "torch_compile" if hidden.device.type == "cpu" else "cce"
    return linear_cross_entropy(  # type: ignore[no-any-return]
        hidden, head.weight, labels, reduction="sum", filter_eps=None, impl=how
    )


def _cce_refusal(hidden: Tensor, head: Scorer) -> str | None:
    return None if head.bias is None else "it takes no bias"


BACKENDS = {
    "torch": Backend(_torch, _torch_refusal, "torch", "'torch>=2.13'"),
    "liger": Backend(_liger, _liger_refusal, "liger_kernel", "liger-kernel"),
    "cce": Backend(
        _cce,
        _cce_refusal,
        "cut_cross_entropy",
        "'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy'",
    ),
}
