"""Rows of `heads.json` after distillation: the head alone, and then the body with it.

    python benchmarks/repairs.py                 # every row that is not there yet
    python benchmarks/repairs.py --only 1.1

The head alone: `sh.repair_head` with the head's own learning rates, codes included. The body too: afterwards head and
body, or adapters in it, together learn the distribution of the untouched dense model by forward KL; no labels, so that
the same training leaves the dense model itself as it is. Perplexity is compared with the untouched dense model. Every
result is printed for the text of the tables and, `dev`, for other text by which the settings were chosen.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from heads import Bench, states_of
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

import hf_softheads as sh
from hf_softheads.bridge import SplitModel
from hf_softheads.heads import ProductVQ, TransformCoded
from hf_softheads.heads.base import HeadSpec
from hf_softheads.losses import KL
from hf_softheads.plan import dense_head

BATCH = 1024
WINDOWS = 4  # a step of the second stage
BODY_LR, LORA_LR, LORA_RANK = 4e-4, 1e-3, 64
SECOND = 0.5  # of the head's own rates


def settings(dim: int) -> dict[str, tuple[HeadSpec, int, int, str]]:
    """Spec, steps for the head alone, steps of the second stage, what of the body it trains."""
    smallest = TransformCoded(1.1, dim * 3 // 4)
    return {
        "2.25": (TransformCoded(2.25), 2500, 600, "body"),
        "1.1": (smallest, 2500, 1800, "body"),
        "1.1 LoRA": (smallest, 2500, 1800, "LoRA"),
        "product_vq": (ProductVQ(dim // 8), 300, 0, ""),
    }


def tune_body(model: Any, dense: Any, rows: Tensor, steps: int, part: str, seed: int) -> Any:
    """Train the body or adapters in it, and the head, towards the dense model's distribution."""
    student, teacher = SplitModel(model), SplitModel(dense)
    head: Any = student.head
    if part == "LoRA":
        torch.manual_seed(seed)
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear")
        inject_adapter_in_model(config, model)
        body = [p for name, p in model.base_model.named_parameters() if "lora_" in name]
    else:
        body = list(model.base_model.parameters())
    for p in body:
        p.requires_grad_(True)
    groups = [{"params": body, "lr": LORA_LR if part == "LoRA" else BODY_LR}]
    for p in head.parameters():
        groups.append({"params": [p.requires_grad_(True)], "lr": SECOND * head.repair_lr(p)})
    groups.append({"params": head.relax_codes(), "lr": SECOND * head.code_lr})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + 1))
    loss_of = KL()
    for step in range(steps):
        batch = rows[order[torch.arange(WINDOWS).add(step * WINDOWS) % len(rows)]]
        with torch.no_grad():
            hidden = teacher.hidden(input_ids=batch)[:, :-1].flatten(0, 1)
            wanted = F.linear(hidden.bfloat16(), teacher.head.weight.bfloat16()).float()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = student.hidden(input_ids=batch)[:, :-1].flatten(0, 1)
        logits = F.linear(hidden.bfloat16(), head.dense()[0].bfloat16()).float()
        loss = loss_of.per_token(logits, batch[:, 1:].flatten(), wanted).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            print(f"  second stage {step} of {steps}: {float(loss.detach()):.4f}", flush=True)
    head.round_codes()
    return model.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bench = Bench.prepare("heldout", arguments.seed)
    dev = Bench.prepare("dev", arguments.seed)
    rows = bench.train.input_ids
    for name, (spec, steps, second, part) in settings(bench.judge.weight.shape[1]).items():
        steps, second = int(steps * arguments.share), int(second * arguments.share)
        if arguments.only is not None and name not in arguments.only:
            continue
        label = f"{spec.name} + distilled"
        last = f"{label} + {part}" if second else label
        if bench.has(last, spec, steps + second):
            continue
        began = time.process_time()
        patched = sh.patch(copy.deepcopy(bench.model), head=spec, stats=bench.stats)
        teacher = dense_head(patched)
        sh.repair_head(patched, teacher, rows, steps=steps, batch_size=BATCH, seed=arguments.seed)
        seconds = time.process_time() - began
        if not bench.has(label, spec, steps):  # another second stage begins with the same head
            for text in (bench, dev):
                text.record(label, spec, patched.get_output_embeddings(), seconds, steps)
        if not second:
            continue
        began = time.process_time()
        patched = tune_body(patched, bench.model, rows, second, part, arguments.seed)
        seconds += time.process_time() - began
        head = patched.get_output_embeddings()
        for text in (bench, dev):
            hidden = states_of(patched, text.held_out)
            text.record(last, spec, head, seconds, steps + second, hidden=hidden)


if __name__ == "__main__":
    main()
