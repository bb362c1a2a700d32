"""Attention by the C++ kernel: any row map of its table, on a CPU, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.attention.call import Call
from hf_softheads.kernels import why_not
from hf_softheads.kernels.attention import attention

RANK = 10
TITLE = "C++ kernel"
COMPILED = True


def supports(call: Call) -> str | None:
    inputs = call.inputs
    if call.spec.row_map() is None:
        return "it has no such row map"
    if not inputs.compiled:
        return "switched off"
    if inputs.query.device.type != "cpu":
        return "it is for CPUs"
    if inputs.query.dtype == torch.float64:
        return "it computes in fp32"
    if inputs.bias is not None:
        return "it adds no bias"
    if inputs.observe is not None:
        return "it shows no weights"
    if inputs.dropout:
        return "it has no dropout"
    if inputs.slopes is not None and inputs.slopes.requires_grad:
        return "it has no gradient of slopes"
    if inputs.key.shape[2] == 0:
        return "there are no keys"
    return why_not("attention")


def run(call: Call) -> Tensor:
    row_map, inputs = call.spec.row_map(), call.inputs
    assert row_map is not None
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
