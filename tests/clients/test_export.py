"""`torch.export` of patched models: the program computes what the model does, for other sizes of batches too."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from transformers import GenerationConfig
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

import hf_softheads as sh
from tests.clients.samples import HEADS, WIDTH, patched
from tests.conftest import VOCAB, make_model

DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
FEW = [("vq", True), ("cascade", False)]
SLOW = [
    pytest.param(name, strict, marks=pytest.mark.slow)
    for name in HEADS
    for strict in (False, True)
    if (name, strict) not in FEW
]


class Logits(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def check(program: Any, module: nn.Module, *inputs: Tensor) -> None:
    for given in inputs:
        # a C++ kernel, which is not in the program, may round differently
        torch.testing.assert_close(program.module()(given), module(given), rtol=1e-5, atol=1e-5)


def states(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(length))


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.client("torch.export", works="every head, with dynamic sizes")
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_every_head(name: str) -> None:
    head = patched(name).lm_head
    one, other = states(2, 5), states(3, 7)
    check(export(head, (one,), dynamic_shapes=(DYNAMIC,), strict=False), head, one, other)


@pytest.mark.parametrize(
    "name", ["hierarchical", "lattice", "sdm"]
)  # with tables beside their weights
@torch.no_grad()
def test_a_saved_program(name: str) -> None:
    head, one, file = patched(name).lm_head, states(2, 5), io.BytesIO()
    torch.export.save(export(head, (one,), strict=True), file)
    file.seek(0)
    check(torch.export.load(file), head, one)


@pytest.mark.client("torch.export", works="whole models, `strict=True` and `strict=False`")
@pytest.mark.parametrize(("name", "strict"), [*FEW, *SLOW])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@torch.no_grad()
def test_a_model(name: str, strict: bool) -> None:
    model, ids = patched(name), some_tokens(2, 6)
    del model.model.layers[1:]
    module = Logits(model)
    program = export(module, (ids,), dynamic_shapes=(DYNAMIC,), strict=strict)
    check(program, module, ids, some_tokens(3, 9))


@pytest.mark.client(
    "torch.export",
    works="patched attention; a static cache, as transformers exports for ExecuTorch",
)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@torch.no_grad()
def test_a_static_cache() -> None:
    model = sh.patch(
        make_model("llama", num_hidden_layers=1), head=sh.heads.VQ(24), attention="sigmoid"
    )
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": 16},
    )
    module = TorchExportableModuleForDecoderOnlyLM(
        model, batch_size=1, max_cache_len=16, device=torch.device("cpu")
    )
    ids = some_tokens(1, 5)
    wanted = model(ids).logits
    program = module.export(input_ids=ids[:, :1], cache_position=torch.zeros(1, dtype=torch.long))
    step = program.module()
    for i in range(5):
        found = step(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i]))
        torch.testing.assert_close(found[:, 0], wanted[:, i], rtol=1e-4, atol=1e-5)
