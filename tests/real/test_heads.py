"""What heads cost and save on SmolLM2-135M, a tied model of 49,152 tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hf_softheads as sh
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.stats import HeadStats

from .conftest import load

pytestmark = pytest.mark.real
# With the most that perplexity may grow by, both ends of the tied model compact, and the least agreement.
HEADS: dict[str, tuple[HeadSpec, float, float]] = {
    "8 bits": (sh.heads.Quantized(8), 1.005, 0.96),
    "4 bits": (sh.heads.Quantized(4), 1.06, 0.83),
    "4 bits, frequent in 8": (sh.heads.Quantized(4, frequent=1536), 1.04, 0.92),
    "4.5 bits": (sh.heads.TransformCoded(bits=4.5), 1.015, 0.94),
    "2.25 bits": (sh.heads.TransformCoded(bits=2.25), 1.12, 0.86),
}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def held(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("name", HEADS)
def test_a_fitted_head(
    name: str, folder: Path, stats: HeadStats, report: torch.Tensor, tmp_path: Path
) -> None:
    """Smaller on disk and in memory than the tied model, nearly as good, and the same after loading."""
    spec, ratio, agreement = HEADS[name]
    model = load(folder)
    before = held(model)
    sh.patch(model, head=spec, stats=stats)
    assert held(model) < before
    found = sh.evaluate(model, report, reference=load(folder), batch_size=2)
    assert found.reference_perplexity is not None
    assert found.top1 is not None
    assert found.perplexity / found.reference_perplexity < ratio
    assert found.top1 > agreement
    model.save_pretrained(tmp_path)
    assert size(tmp_path) < size(folder)
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(report[:1]).logits, model(report[:1]).logits)
