"""What is measured of a run and what is left of it: held-out loss, quality in stages, the exported model."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkpoints
import export
import preparing
import torch
from accelerate import Accelerator
from experiment import Experiment
from torch import nn
from transformers import PreTrainedModel

import hf_softheads as sh
from hf_softheads.files import write_json
from hf_softheads.report.provenance import provenance
from hf_softheads.text.packing import Row


@torch.no_grad()
def held_out_loss(
    model: nn.Module, table: Row | None, micro: int, accelerator: Accelerator
) -> float | None:
    """Mean nats a token, all processes together; every process runs the same number of forward passes."""
    if table is None:
        return None
    goal = sh.Objective(model, {"cross_entropy": 1.0})
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, device=accelerator.device)
    step = micro * accelerator.num_processes
    for i in range(0, len(table["input_ids"]), step):
        first = i + accelerator.process_index * micro
        piece = {k: v[first : first + micro].to(accelerator.device) for k, v in table.items()}
        if not len(
            piece["input_ids"]
        ):  # nothing is left for this process: run along, count nothing
            piece = {k: v[:1].to(accelerator.device) for k, v in table.items()}
            piece["labels"] = torch.full_like(piece["labels"], -100)
        count = (piece["labels"][:, 1:] != -100).sum()
        sums += torch.stack([goal(**piece, reduction="sum").float(), count.float()])
    model.train(was_training)
    total, count = accelerator.reduce(sums, "sum").tolist()
    return total / count


def not_finite(
    step: int, loss: float, norm: float, batch: Row, tokenizer: Any, folder: Path
) -> str:
    found = checkpoints.complete(folder)
    last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    text = tokenizer.decode(batch["input_ids"][0][:32])
    return (
        f"loss {loss}, gradient norm {norm} at step {step}; nothing was updated and {last}. The batch of this "
        f"process begins with {text!r}"
    )


def finish(
    experiment: Experiment,
    output: Path,
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: Any,
    held_out: Row | None,
    curve: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """Save the model (adapters merged) and the results."""
    state = accelerator.get_state_dict(model)
    results: dict[str, Any] = {
        "experiment": experiment.to_dict(),
        "base_model": experiment.model,
        "data": f"{experiment.eval_data or experiment.data}, {experiment.eval_split or 'held out'}",
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "seconds": round(seconds, 1),
        "loss": curve[-1]["loss"],
        "curve": curve,
        "stages": [],
    }
    if accelerator.is_main_process:
        final: Any
        final, _ = preparing.trainable(experiment, output)  # the trained one may be in pieces
        final.load_state_dict(state)
        if experiment.train == "lora":
            final.save_pretrained(output / "adapter")
            final = final.merge_and_unload()
        final = final.to("cpu", getattr(torch, experiment.dtype)).eval()
        if held_out is not None:
            results["stages"] = stages(experiment, output, final, held_out)
        results["provenance"] = provenance(experiment.seed)
        shutil.rmtree(output / "model", ignore_errors=True)  # of a run that was killed here
        export.save(final, tokenizer, output / "model", results)
        write_json(output / export.RESULTS, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def stages(
    experiment: Experiment, output: Path, final: PreTrainedModel, held_out: Row
) -> list[dict[str, Any]]:
    """Quality of the original, of the patched model before training, and after it."""
    dtype = getattr(torch, experiment.dtype)
    original, _ = preparing.load(experiment.model, dtype)
    found = [("original", original), ("trained", final)]
    if experiment.head is not None or experiment.attention is not None:
        found.insert(1, ("patched", preparing.load(str(output / "start"), dtype)[0]))
    return [
        {"name": name, **asdict(sh.evaluate(m, [held_out], reference=original))}
        for name, m in found
    ]
