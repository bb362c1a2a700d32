"""Speed of one decoding step of the compact heads at the size of a 1 B model's head.

    python benchmarks/head_speed.py      # about three minutes on two cores; writes benchmarks/results/head_speed.json

Synthetic weights and codes, V=128,256, D=2,048, bf16. Ratio to the dense bf16 `nn.Linear` in the same process, cold
caches, interleaved, CPU time of one thread (other work on the machine slows the dense product, which waits for
memory, more than the compact heads). What is in the codes does not change the speed; whether a screen finds the
right tokens is a matter of quality and not measured here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from timing import compare

from hf_softheads.heads import Dense, LowRank, Quantized, ResidualVQ, Screened
from hf_softheads.heads.base import HeadSpec
from hf_softheads.kernels import why_not
from hf_softheads.results import provenance, write_json

RESULTS = Path(__file__).parent / "results"
VOCAB, DIM = 128_256, 2_048


def build(spec: HeadSpec) -> Any:
    """A head in bf16 with random parameters and codes."""
    head = spec.module(DIM, VOCAB)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for name, buffer in head.named_buffers():
        high = 256 if name.rpartition(".")[2] != "codes" else min(256, head_codes(head))
        buffer.copy_(torch.randint(high, buffer.shape))
    return head.bfloat16()


def head_codes(head: Any) -> int:
    """How many codes a residual codebook has."""
    return int(getattr(head, "screen", head).weight.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    dense = nn.Linear(DIM, VOCAB, bias=False, dtype=torch.bfloat16)
    specs: dict[str, HeadSpec] = {
        **{f"quantized {bits} bit": Quantized(bits) for bits in (8, 4, 3, 2)},
        "low_rank D/4": LowRank(DIM // 4),
        "residual_vq 4 x 1024": ResidualVQ(4, 1024),
    }
    heads = {name: build(spec) for name, spec in specs.items()}
    screens: dict[str, Any] = {}
    inner = Dense().module(DIM, VOCAB).bfloat16()
    inner.weight.data = dense.weight.data  # the exact rows are the dense head's own
    for name in ("quantized 2 bit", "residual_vq 4 x 1024", "low_rank D/4"):
        screened = Screened(specs[name], 256).module(8, 16)
        screened.in_features, screened.out_features = DIM, VOCAB
        screened.screen, screened.inner = heads[name], inner
        screened.weight.data.zero_()
        screens[f"screened by {name}"] = screened
    found: dict[str, Any] = {}
    for batch in (1, 16):
        hidden = torch.randn(batch, DIM).bfloat16()
        functions: dict[str, Any] = {
            "dense": lambda h=hidden: dense(h),
            "dense, greedy": lambda h=hidden: dense(h).argmax(-1),
        }
        for name, head in heads.items():
            if batch == 1 or not name.startswith("quantized"):
                functions[f"{name}, all scores"] = lambda h=hidden, head=head: head(h)
        for name, head in screens.items():
            if batch == 1 or "quantized" not in name:
                functions[f"{name}, greedy"] = lambda h=hidden, head=head: head.topk(h, 1)
        with torch.inference_mode():
            found[f"batch {batch}"] = compare(
                functions, "dense", rounds=9, seconds=40, clock=time.thread_time
            )
        for name, row in found[f"batch {batch}"].items():
            print(
                f"batch {batch:>2}  {name:<42} {row['ms']:8.3f} ms  x{row['ratio']:.1f}", flush=True
            )
    write_json(
        RESULTS / "head_speed.json",
        {
            "shape": [VOCAB, DIM],
            "dtype": "bfloat16",
            "clock": "CPU time of one thread",
            "kernel": why_not("quantized") or "C++",
            "speed": found,
            "provenance": provenance(arguments.seed),
        },
    )


if __name__ == "__main__":
    main()
