"""Repair a new head by distillation, or fine-tune a patched (or plain) model with adapters or wholly.

    accelerate launch recipes/finetune.py --config recipes/experiments/repair_vq.json --output runs/repair

    accelerate launch recipes/finetune.py --repair head --set model=ID --set head=product_vq --output runs/head
    accelerate launch recipes/finetune.py --repair lora --set model=runs/head/model --set teacher=ID --output runs/lora

An experiment is one JSON file (fields: see `experiment.py`). `--repair` is the short form of two: distil the dense head
into the new one, the body frozen; then distil the dense model into adapters on the body and the head. `--set` changes
a field.

The output folder holds the experiment, the patched model before training (`start`), checkpoints, `results.json` with
provenance, and the trained model (`model`; for adapters merged, and apart in `adapter`). Killed or stopped and started
again with the same arguments, it continues where the last checkpoint was and ends at the same loss.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import finishing
import preparing
import torch
import transformers
from accelerate.utils import set_seed
from experiment import Experiment
from tqdm import tqdm

import hf_softheads as sh
from hf_softheads.registry import read_setting, spec_from_dict
from hf_softheads.training.orthograd import OrthoGrad
from hf_softheads.training.rates import parameter_groups

REPAIRS: dict[str, dict[str, Any]] = {
    "head": {"train": "head", "losses": {"kl": 1.0}, "lr": 3e-3},
    "lora": {"train": "lora", "losses": {"kl": 1.0}},
}


def run(experiment: Experiment, output: Path) -> dict[str, Any]:
    """Train, or continue training, and write everything to `output`; the results.

    Raises:
        ValueError: the folder belongs to another experiment; a batch that cannot be divided; text without tokens.
        FloatingPointError: a loss or gradient that is not finite; the last checkpoint stays as it was.
        SystemExit: SIGTERM came; a checkpoint was written.
    """
    preparing.claim(experiment, output)
    accelerator = preparing.launch(experiment, output)
    world, rank = accelerator.num_processes, accelerator.process_index
    if experiment.batch % world:
        raise ValueError(f"batch {experiment.batch} does not divide by {world} processes")
    share = experiment.batch // world
    micro = min(experiment.micro_batch or share, share)
    set_seed(experiment.seed)
    if accelerator.is_main_process:
        preparing.prepare_start(experiment, output)
    accelerator.wait_for_everyone()
    model: Any
    model, tokenizer = preparing.trainable(experiment, output)
    teacher = preparing.teacher_of(experiment)
    if teacher is not None:
        teacher.to(accelerator.device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        parameter_groups(model, experiment.lr),
        betas=(0.9, 0.95),
        weight_decay=experiment.weight_decay,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    if experiment.optimizer == "orthograd":
        optimizer = OrthoGrad(optimizer)
    batches = preparing.training_batches(experiment, tokenizer, rank * share, share)
    held_out = preparing.evaluation_rows(experiment, tokenizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = [
        p for p in model.parameters() if p.requires_grad
    ]  # FSDP2 has put others in their place
    losses: dict[Any, float] = dict(experiment.weighted_losses())
    goal = sh.Objective(model, losses, teacher, backend=experiment.backend)

    folder = output / "checkpoints"
    progress = checkpoints.restore(accelerator, folder) or {"step": 0, "curve": [], "seconds": 0.0}
    start, curve = progress["step"], progress["curve"]
    clock = time.perf_counter() - progress["seconds"]
    bar = tqdm(total=experiment.steps, initial=start, disable=None if rank == 0 else True)
    model.train(experiment.train != "head")

    def checkpoint(step: int) -> None:
        progress = {"curve": curve, "seconds": time.perf_counter() - clock}
        checkpoints.save(accelerator, folder, step, progress, experiment.keep)

    with stop_signal() as stop:
        for step in range(start, experiment.steps):
            batch = {k: v.to(accelerator.device) for k, v in batches.at(step).items()}
            facts = torch.tensor(
                [float((batch["labels"][:, 1:] != -100).sum()), float(stop.called)]
            )
            tokens, stopping = accelerator.reduce(facts.to(accelerator.device), "sum").tolist()
            if stopping:
                checkpoint(step)
                accelerator.end_training()
                raise SystemExit(128 + signal.SIGTERM)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * experiment.rate(step)
            loss = torch.zeros((), device=accelerator.device)
            pieces = [
                {k: v[i : i + micro] for k, v in batch.items()} for i in range(0, share, micro)
            ]
            for piece in pieces:
                last = piece is pieces[-1]
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    part = goal(**piece, num_items_in_batch=tokens)
                    accelerator.backward(part * world)
                loss += part.detach()
            value = float(accelerator.reduce(loss, "sum"))
            norm = float(accelerator.clip_grad_norm_(trained, experiment.clip))
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise FloatingPointError(
                    finishing.not_finite(step, value, norm, batch, tokenizer, folder)
                )
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            done = step + 1
            entry: dict[str, Any] = {"step": done, "loss": value, "gradient_norm": norm}
            if experiment.eval_every and (
                done % experiment.eval_every == 0 or done == experiment.steps
            ):
                entry["held_out"] = finishing.held_out_loss(model, held_out, micro, accelerator)
                if rank == 0:
                    tqdm.write(json.dumps(entry))
            curve.append(entry)
            accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=done)
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
            if experiment.checkpoint_every and done % experiment.checkpoint_every == 0:
                checkpoint(done)
    bar.close()
    seconds = time.perf_counter() - clock
    return finishing.finish(
        experiment, output, accelerator, model, tokenizer, held_out, curve, seconds
    )


class _Stop:
    called = False


@contextlib.contextmanager
def stop_signal() -> Iterator[_Stop]:
    """Notes SIGTERM instead of dying of it."""
    stop = _Stop()

    def note(*_: Any) -> None:
        stop.called = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="the experiment, a JSON file")
    parser.add_argument("--repair", choices=list(REPAIRS), help="a ready-made experiment")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if (given.config is None) == (given.repair is None):
        parser.error("give either --config or --repair")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    fields = dict(REPAIRS[given.repair]) if given.repair else _read(given.config)
    for setting in given.set:
        field, value = read_setting(setting)
        fields[field] = value
    return run(spec_from_dict("experiment", {"name": "experiment", **fields}), given.output)


def _read(path: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return fields


if __name__ == "__main__":
    main()
