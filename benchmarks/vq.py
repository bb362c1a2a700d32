"""What VQ-Logits costs and wins as a retrofit: as published, repaired, repaired and distilled.

    python benchmarks/vq.py            # about ten minutes on two cores; writes benchmarks/results/vq.json and vq.png

Quality on the embedded model (held-out modules of the standard library), speed as the ratio of one decoding step
(full logits) to the dense bf16 `nn.Linear` in the same process.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from timing import compare

import hf_softheads as sh
from hf_softheads.files import write_json
from hf_softheads.plan import dense_head
from hf_softheads.report.plots import plot_frontier
from hf_softheads.report.provenance import provenance
from hf_softheads.text.embedded import load_embedded
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows
from hf_softheads.training.distill_head import repair_head

RESULTS = Path(__file__).parent / "results"


def speed(model: Any, dense: nn.Linear, batch: int) -> dict[str, float]:
    """Full logits of one decoding step, bf16, ratio to the dense `nn.Linear`."""
    head = copy.deepcopy(model.get_output_embeddings())
    for name, parameter in head.named_parameters():
        if name not in getattr(head, "keep_in_fp32", ()):
            parameter.data = parameter.data.bfloat16()
    hidden = torch.randn(batch, dense.in_features, dtype=torch.bfloat16)
    with torch.inference_mode():
        return compare({"dense": lambda: dense(hidden), "head": lambda: head(hidden)}, "dense")[
            "head"
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of distillation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model, tokenizer = load_embedded()
    vocab, window = model.config.vocab_size, model.config.max_position_embeddings
    train = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(arguments.seed)
    train = train.head(1_048_576)
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=window)
    stats = sh.collect(model, train)
    linear = nn.Linear(model.config.hidden_size, vocab, bias=False, dtype=torch.bfloat16)
    linear.weight.data.copy_(model.lm_head.weight)
    rows: list[dict[str, Any]] = []

    def measure(stage: str, divisor: int | None, patched: Any) -> None:
        head = patched.get_output_embeddings()
        dense_size = linear.weight.numel()
        row = {
            "stage": stage,
            "divisor": divisor,
            "codes": None if divisor is None else head.weight.shape[0],
            "floor": getattr(head, "perplexity_floor", None),
            **asdict(sh.evaluate(patched, held_out, reference=model)),
            "parameters": sum(p.numel() for p in head.parameters()),
            "bytes": _bytes(head),
            "dense_parameters": dense_size,
            "dense_bytes": 2 * dense_size,
            "speed_batch_1": speed(patched, linear, 1),
            "speed_batch_16": speed(patched, linear, 16),
        }
        rows.append(row)
        print(f"{stage:<22} V/{divisor}: perplexity {row['perplexity']:.2f}", flush=True)

    measure("dense", None, model)
    for divisor in (8, 16, 32, 100):
        codes = vocab // divisor
        published = sh.patch(copy.deepcopy(model), head=sh.heads.VQ(codes=codes), stats=stats)
        measure("published", divisor, published)
        repaired = sh.patch(
            copy.deepcopy(model), head=sh.heads.VQ.repaired(codes=codes), stats=stats
        )
        measure("repaired", divisor, repaired)
        for name, patched in (("published", published), ("repaired", repaired)):
            repair_head(
                patched,
                dense_head(patched),
                train.input_ids,
                steps=arguments.steps,
                seed=arguments.seed,
            )
            measure(f"{name} + distilled", divisor, patched)
    write_json(
        RESULTS / "vq.json",
        {
            "model": "embedded",
            "data": "held-out modules of the standard library",
            "distillation_steps": arguments.steps,
            "rows": rows,
            "provenance": provenance(arguments.seed),
        },
    )
    dense = rows[0]["perplexity"]
    points = [
        {
            "variant": r["stage"],
            "baseline": r["stage"] == "published",
            "ratio": r["perplexity"] / dense,
            "bytes": r["bytes"] / 1024,
        }
        for r in rows[1:]
    ]
    plot_frontier(
        points,
        RESULTS / "vq.png",
        x="bytes",
        xlabel="stored bytes of the head (KiB, bf16)",
        title=f"VQ-Logits on the embedded model (dense: {rows[0]['dense_bytes'] / 1024:.0f} KiB)",
    )


def _bytes(head: nn.Module) -> int:
    """As stored with the floating-point matrices in bf16."""
    in_fp32 = getattr(head, "keep_in_fp32", ())
    total = 0
    for name, tensor in head.state_dict().items():
        size = 2 if tensor.is_floating_point() and name not in in_fp32 else tensor.element_size()
        total += tensor.numel() * size
    return total


if __name__ == "__main__":
    main()
