"""Sizes of a head: parameters, bytes as stored, bytes read, FLOPs. The one place that counts them."""

from __future__ import annotations

import copy

import torch

from hf_softheads.heads.base import Head, HeadSpec


def head_sizes(head: Head) -> dict[str, dict[str, int]]:
    """Parameters, bytes stored, bytes read and FLOPs a token of a head and of the dense one, matrices in bf16."""
    half = copy.deepcopy(head)
    for name, parameter in half.named_parameters():
        if name not in head.keep_in_fp32:
            parameter.data = parameter.data.bfloat16()
    mine = {
        "parameters": half.n_parameters,
        "nbytes": stored_bytes(head),
        "bytes_read": half.bytes_read,
        "flops": half.flops,
    }
    weights = head.in_features * head.out_features
    dense = {
        "parameters": weights,
        "nbytes": 2 * weights,
        "bytes_read": 2 * weights,
        "flops": 2 * weights,
    }
    return {"head": mine, "dense": dense}


def stored_bits(spec: HeadSpec, dim: int, vocab: int, *, bias: bool) -> float:
    """Stored bits per weight of the dense matrix `(vocab, dim)`, parameters in bf16, everything included.

    Raises:
        ValueError: the spec does not suit such a matrix.
    """
    spec.check(dim, vocab)
    with torch.device("meta"):
        head = spec.module(dim, vocab, bias=bias)
    return 8 * stored_bytes(head) / (vocab * dim)


def stored_bytes(head: Head) -> int:
    """Bytes in a checkpoint whose parameters are bf16, but for those that the head keeps in fp32."""
    stored = 0
    for name, tensor in head.state_dict(keep_vars=True).items():
        half = tensor.is_floating_point() and name not in head.keep_in_fp32
        stored += tensor.numel() * (2 if half else tensor.element_size())
    return stored
