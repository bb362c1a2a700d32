"""Processes of a test: forks of a server that has imported what takes seconds and used nothing of it."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

_IMPORTED = (
    "accelerate",
    "datasets",
    "hf_softheads.checkpoint",
    "hf_softheads.training.objective",
    "peft",
    "pytest",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
)


def start(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `function(rank, *arguments)` in `count` processes and wait; one that fails raises its error here."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_IMPORTED))
    mp.start_processes(function, arguments, count, start_method="forkserver")


def join(rank: int, count: int, port: int) -> None:
    """What a launcher tells one of `count` processes of the others."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
