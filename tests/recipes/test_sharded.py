"""Two gloo processes: the Objective on a model sharded by `fully_shard` or ZeRO-3, or under DDP, is that of one."""

from __future__ import annotations

import os
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_softheads as sh
from hf_softheads.heads import VQ
from tests.conftest import VOCAB, make_model
from tests.recipes import processes

WORLD = 2
LOSSES = {"cross_entropy": 1.0, "entmax15": 0.1}
ROWS = torch.randint(3, VOCAB, (4, 14), generator=torch.Generator().manual_seed(0))


def model_for(case: str) -> Any:
    model = make_model("llama", tie_word_embeddings=case.endswith("tied")).train()
    if case.endswith("vq"):
        sh.patch(model, head=VQ(codes=40))
    return model


def shard(model: Any, case: str) -> Any:
    if case.startswith("ddp"):
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if "head" in case:
        fully_shard(model.lm_head)
    fully_shard(model)
    return model


def train(model: Any, rows: torch.Tensor, count: int, factor: int) -> list[float]:
    goal = sh.Objective(model, LOSSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    curve = []
    for _ in range(3):
        loss = goal(input_ids=rows, labels=rows, num_items_in_batch=count)
        (loss * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


def worker(rank: int, port: int, cases: list[str], folder: str) -> None:
    processes.join(rank, WORLD, port)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases:
        model = shard(model_for(case), case)
        mine = ROWS.chunk(WORLD)[rank]
        curve = torch.tensor(train(model, mine, ROWS[:, 1:].numel(), WORLD))
        dist.all_reduce(curve)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            torch.save((curve.tolist(), state), Path(folder) / f"{case}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    processes.start(worker, WORLD, processes.free_port(), CASES, str(folder))
    return folder


CASES = [
    "fsdp2_head_apart",
    "fsdp2_whole",
    "fsdp2_tied",
    "fsdp2_head_vq",
    "ddp",
    "ddp_tied",
    "ddp_vq",
]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, outcomes: Path) -> None:
    curve, state = torch.load(outcomes / f"{case}.pt", weights_only=True)
    model = model_for(case)
    expected = train(model, ROWS, ROWS[:, 1:].numel(), 1)
    assert curve == pytest.approx(expected, rel=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def zero3(rank: int, port: int, folder: str) -> None:
    """Three steps of DeepSpeed's ZeRO stage 3, and the whole gradient of every parameter in the first."""
    processes.join(rank, WORLD, port)
    os.environ.update(LOCAL_SIZE=str(WORLD), DS_ACCELERATOR="cpu")
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    for case in ZERO3:
        model = model_for(case)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        goal, rows = sh.Objective(engine, LOSSES), ROWS.chunk(WORLD)[rank]
        loss = goal(input_ids=rows, labels=rows, num_items_in_batch=ROWS[:, 1:].numel())
        engine.backward(loss * WORLD)
        found = {k: safe_get_full_grad(p).clone() for k, p in engine.module.named_parameters()}
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            torch.save((float(total), found), Path(folder) / f"{case}.pt")
    dist.barrier()
    dist.destroy_process_group()


ZERO3 = ["zero3", "zero3_tied", "zero3_vq"]


@pytest.mark.skipif(not util.find_spec("deepspeed"), reason="deepspeed is not installed")
def test_zero3_has_the_gradients_of_one_process(tmp_path: Path) -> None:
    processes.start(zero3, WORLD, processes.free_port(), str(tmp_path))
    for case in ZERO3:
        loss, found = torch.load(tmp_path / f"{case}.pt", weights_only=True)
        model = model_for(case)
        expected = sh.Objective(model, LOSSES)(input_ids=ROWS, labels=ROWS)
        expected.backward()
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
