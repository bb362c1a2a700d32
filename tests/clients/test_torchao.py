"""torchao's 8-bit weights as the body of a patched model, on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import TorchAoConfig

from tests.clients import quantized_bodies as bodies

torchao = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed: pip install torchao"
)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LAYER = torch.nn.Linear, torch.Tensor


def eight_bits() -> TorchAoConfig:
    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


@pytest.mark.client("torchao", works="an int8 body, then `patch`, save, load, `unpatch`")
def test_patched_after_loading(tokens, tmp_path):
    bodies.check_patched_after_loading(eight_bits(), *LAYER, tokens, tmp_path)


@pytest.mark.client("torchao", works="int8 and a patch while loading (`inner=`)")
def test_patched_while_loading(tokens, tmp_path):
    bodies.check_patched_while_loading(eight_bits(), *LAYER, tokens, tmp_path)


@pytest.mark.client(
    "torchao",
    works="a loaded folder, unpatched and saved with `save_original_format=False`",
)
def test_a_loaded_folder(tokens, tmp_path):
    bodies.check_loaded_folder(eight_bits(), tokens, tmp_path)
