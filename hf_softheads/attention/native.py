"""Attention by the C++ kernel: any row map that it has, on a CPU, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_softheads import kernels
from hf_softheads.kernels.attention import attention

if TYPE_CHECKING:
    from hf_softheads.attention.base import AttentionSpec, Inputs


class RowMap(NamedTuple):
    """What the kernel does to a row of scores: a name in `MAPS` of kernels/attention_blocks.hpp and its constants."""

    name: str
    constants: tuple[float, ...] = ()


SOFTMAX = RowMap("softmax")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unavailable() -> str | None:
    """Why there is no kernel on this machine, or None."""
    return kernels.why_not("attention")


def lacking(spec: AttentionSpec) -> str | None:
    """Why no kernel can run this variant here, or None."""
    return "no kernel has this row map" if spec.row_map() is None else unavailable()


def possible(inputs: Inputs) -> bool:
    """Is there a kernel, and does it know everything that these inputs ask for?"""
    return (
        inputs.compiled
        and inputs.query.device.type == "cpu"
        and inputs.query.dtype != torch.float64
        and inputs.bias is None
        and inputs.observe is None
        and not inputs.dropout
        and not (inputs.slopes is not None and inputs.slopes.requires_grad)
        and inputs.key.shape[2] > 0
        and unavailable() is None
    )


def attend(row_map: RowMap, inputs: Inputs) -> Tensor:
    """`weights(scores) @ value`, `(B, H, Q, Dv)` fp32."""
    out: Tensor = attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.keep,
        inputs.slopes,
        row_map.name,
        list(row_map.constants),
        float(inputs.scaling),
        float(inputs.softcap or 0.0),
        inputs.window or 0,
        inputs.causal,
    )
    return out


def path(otherwise: str) -> str:
    """For `describe`: which path runs, and why."""
    reason = unavailable()
    if reason is not None:
        return f"{otherwise}: {reason}"
    return f"C++ kernel: {kernels.instructions('attention')}; {otherwise} where it does not apply"
