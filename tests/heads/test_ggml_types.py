"""ggml's block formats: what is packed is what a reader of the file unpacks, and feedback beats rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from hf_softheads.heads.fit.ggml_types import BLOCK, TYPES, fit_blocks
from tests.heads.conftest import Toy

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install hf_softheads[gguf]")
each = pytest.mark.parametrize("name", TYPES)


def matrix(dim: int = 2 * BLOCK, vocab: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(vocab, dim, generator=generator) * torch.linspace(0.01, 2, dim)


def as_read(name: str, packed: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name]))


@each
def test_packed_bytes_are_those_of_ggml(name: str) -> None:
    blocks = fit_blocks(matrix(), TYPES[name], None)
    packed = blocks.packed()
    assert packed.shape[1] * 8 == TYPES[name].bits * matrix().shape[1]
    torch.testing.assert_close(as_read(name, packed), blocks.rows(), rtol=1e-6, atol=0)


@each
def test_a_row_of_zeros_and_one_far_number(name: str) -> None:
    weight = torch.zeros(3, BLOCK)
    weight[1, 5], weight[2] = -7.0, 3.0
    rows = fit_blocks(weight, TYPES[name], None).rows()
    least = 0.06 if name == "IQ4_NL" else 2e-3  # it has no 0; fp16 has 11 bits
    torch.testing.assert_close(rows, weight, rtol=0.01, atol=least)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_grids_are_no_worse_than_ggmls_own(name: str) -> None:
    """Rounded to nearest on our grid and on that of ggml's own quantizer."""
    weight = matrix()
    own = fit_blocks(weight, TYPES[name], None).rows() - weight
    plain = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
    theirs = as_read(name, torch.from_numpy(plain)) - weight
    assert own.square().mean() <= 1.001 * theirs.square().mean()


@each
def test_feedback_beats_rounding_on_logits(name: str, toy: Toy) -> None:
    weight = torch.cat([toy.weight, 0.5 * toy.weight.flip(0)], 1)  # 32 columns
    hidden = torch.cat([toy.hidden, 0.3 * toy.hidden.roll(1, 1)], 1)
    moment = hidden.double().T @ hidden.double() / len(hidden)
    moment += 1e-3 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    metrics = torch.zeros(len(weight), dtype=torch.long), moment.unsqueeze(0)
    errors = []
    for known in (metrics, None):
        rows = fit_blocks(weight, TYPES[name], known).rows()
        errors.append(float((hidden @ (rows - weight).T).square().mean()))
    assert errors[0] < 0.8 * errors[1]
