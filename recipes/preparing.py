"""What comes before the first step: the folder, the processes, the patched model, what is trained, the data."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from experiment import Experiment
from torch import nn

import hf_softheads as sh
from hf_softheads import pretrained
from hf_softheads.bridge import CHILD, find_head, output_head, vocabulary
from hf_softheads.files import write_json
from hf_softheads.plan import plan_of
from hf_softheads.text.documents import read
from hf_softheads.text.packing import Batches, Row, rows, stacked


def claim(experiment: Experiment, output: Path) -> None:
    """Make the folder this experiment's, or see that it is."""
    path = output / "experiment.json"
    mine = json.loads(json.dumps(experiment.to_dict()))
    if path.is_file():
        theirs = json.loads(path.read_text())
        if theirs != mine:
            changed = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
            listed = ", ".join(
                f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in changed
            )
            raise ValueError(
                f"{output} belongs to another experiment ({listed}); choose another --output"
            )
    elif int(os.environ.get("RANK", "0")) == 0:
        write_json(path, mine)


def launch(experiment: Experiment, output: Path) -> Accelerator:
    """The accelerator, refused where processes were launched that do not know of each other."""
    precision = experiment.precision
    if precision == "auto":
        precision = "bf16" if _has_bf16() else "fp32"
    if experiment.tracker is not None and experiment.tracker not in _trackers():
        raise ValueError(
            f"the tracker {experiment.tracker!r} is not installed; there are: {', '.join(_trackers()) or 'none'}"
        )
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=experiment.tracker,
        project_dir=str(output),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate connects {accelerator.num_processes}: on CPUs use "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`"
        )
    _shard_on_cpus(accelerator)
    if experiment.tracker:
        accelerator.init_trackers(
            "hf_softheads", config={"experiment": json.dumps(experiment.to_dict())}
        )
    return accelerator


def _trackers() -> list[str]:
    """accelerate's that are installed, and those registered with it."""
    known = {str(kind): kind for kind in LOGGER_TYPE_TO_CLASS}
    shipped = {str(kind) for kind in LoggerType}
    installed = {str(kind) for kind in get_available_trackers()}
    return sorted(name for name in known if name not in shipped or name in installed)


def _shard_on_cpus(accelerator: Accelerator) -> None:
    """accelerate reads an FSDP configuration and leaves it aside where the processes have no accelerator; keep it."""
    state = accelerator.state
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        # every new AcceleratorState copies its parent's
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def _has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def load(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokenizer. Raises OSError or ValueError, with a reason in one line."""
    named = pretrained.find(name)
    return named.load(dtype), named.tokenizer


def prepare_start(experiment: Experiment, output: Path) -> None:
    """The patched model before training, in `output/start`: made once, for all processes and restarts."""
    start = output / "start"
    if start.exists():
        return
    model, tokenizer = load(experiment.model, getattr(torch, experiment.dtype))
    if len(tokenizer) > vocabulary(model):
        raise ValueError(
            f"the tokenizer of {experiment.model} has {len(tokenizer)} tokens, its model {vocabulary(model)}: they do "
            "not belong together"
        )
    taught = [loss.name for loss in experiment.weighted_losses() if loss.needs_teacher]
    nothing_new = experiment.head is None and experiment.attention is None
    if taught and experiment.teacher is None and nothing_new:
        raise ValueError(
            f"{', '.join(taught)} would compare {experiment.model} with itself: set head or attention to patch it "
            "here, or, for a model that is patched already, teacher to the original one"
        )
    training_text(experiment)  # a wrong data set is refused before the work begins
    if experiment.head is not None or experiment.attention is not None:
        stats = None
        if experiment.head is not None and experiment.calibration_tokens:
            count = max(1, experiment.calibration_tokens // experiment.window)
            some = rows(training_text(experiment), tokenizer, experiment.window, "stream")
            table = stacked(itertools.islice(some, count))
            stats = sh.collect(model, [table])
        sh.patch(model, head=experiment.head, attention=experiment.attention, stats=stats)
    fresh = start.with_name("start.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    fresh.rename(start)


def trainable(experiment: Experiment, output: Path) -> tuple[nn.Module, Any]:
    """The model with what is to be trained marked, and its tokenizer."""
    dtype = getattr(torch, experiment.dtype)
    model, tokenizer = load(str(output / "start"), dtype)
    model.config.use_cache = False
    if experiment.gradient_checkpointing:
        older = getattr(
            model, "gradient_checkpointing_enable", None
        )  # its name in transformers 5.0
        enable = getattr(model, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    if experiment.train == "head":
        model.requires_grad_(False)
        for p in output_head(model).parameters():
            p.requires_grad_(p.is_floating_point())
    elif experiment.train == "lora":
        from peft import LoraConfig, get_peft_model

        plan = plan_of(model)
        patched = []
        if plan is not None and plan.head is not None:
            patched.append(find_head(model)[0].rpartition(".")[2])
        if plan is not None and plan.attention is not None:
            patched.append(CHILD)
        config = LoraConfig(
            r=experiment.lora_rank,
            lora_alpha=experiment.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=experiment.lora_dropout,
            target_modules=list(experiment.lora_targets) or "all-linear",
            modules_to_save=patched or None,
            use_dora=experiment.dora,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    return model, tokenizer


def teacher_of(experiment: Experiment) -> nn.Module | None:
    """What the losses compare with: a model, or for head repair the original head alone."""
    wanting = [loss for loss in experiment.weighted_losses() if loss.needs_teacher]
    if not wanting:
        return None
    teacher: nn.Module
    teacher, _ = load(experiment.teacher or experiment.model, getattr(torch, experiment.dtype))
    same_states = experiment.teacher is None and experiment.train == "head"
    if same_states and not any(loss.name == "hidden_mse" for loss in wanting):
        teacher = output_head(teacher)
    return teacher.requires_grad_(False)


def training_text(experiment: Experiment) -> Any:
    return read(
        experiment.data, experiment.split, experiment.text_column, streaming=experiment.streaming
    )


def training_batches(experiment: Experiment, tokenizer: Any, first: int, count: int) -> Batches:
    e = experiment

    def make() -> Iterator[Row]:
        return rows(training_text(e), tokenizer, e.window, e.packing)

    seed = None if e.streaming else e.seed
    return Batches(make, batch=e.batch, first=first, count=count, seed=seed)


def evaluation_rows(experiment: Experiment, tokenizer: Any) -> Row | None:
    """Held-out rows, or None where the experiment names none."""
    source, split = experiment.eval_data, experiment.eval_split
    if source is None and split is None:
        if experiment.data != "stdlib":
            return None
        split = "heldout"
    texts = read(source or experiment.data, split or experiment.split, experiment.text_column)
    count = max(1, experiment.eval_tokens // experiment.window)
    return stacked(itertools.islice(rows(texts, tokenizer, experiment.window, "stream"), count))
