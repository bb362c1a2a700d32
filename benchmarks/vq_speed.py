"""Speed and memory of the VQ head at the size of a 1 B model's head, and of its k-means.

    python benchmarks/vq_speed.py      # about four minutes on two cores; writes benchmarks/results/vq_speed.json

Synthetic weights, V=128,256, D=2,048, bf16. Speed: ratio to the dense bf16 `nn.Linear` in the same process, cold
caches, interleaved. Memory: growth of the peak resident size in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from timing import compare

import hf_softheads as sh
from hf_softheads.files import write_json
from hf_softheads.heads.fit.kmeans import kmeans
from hf_softheads.measure.memory import peak_memory
from hf_softheads.report.provenance import provenance

RESULTS = Path(__file__).parent / "results"
VOCAB, DIM, TOKENS = 128_256, 2_048, 2_048


def vq_head(codes: int) -> Any:
    """A head with random codebook and map: what is in them does not change its speed."""
    head = sh.heads.VQ(codes=codes).module(DIM, VOCAB)
    nn.init.normal_(head.weight, std=DIM**-0.5)
    head.codes.copy_(torch.randint(codes, (VOCAB,)))
    head.codes[:codes] = torch.arange(codes)
    return head.bfloat16()


def speed(batch: int, divisors: tuple[int, ...]) -> dict[str, Any]:
    dense = nn.Linear(DIM, VOCAB, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(batch, DIM).bfloat16()
    candidates: dict[str, Any] = {
        "dense": lambda: dense(hidden),
        "dense, greedy": lambda: dense(hidden).argmax(-1),
        "dense, sample": lambda: torch.multinomial(dense(hidden).float().softmax(-1), 1),
    }
    for divisor in divisors:
        head = vq_head(VOCAB // divisor)
        candidates |= {
            f"V/{divisor}, full logits": lambda head=head: head(hidden),
            f"V/{divisor}, greedy": lambda head=head: head.topk(hidden, 1),
            f"V/{divisor}, sample": lambda head=head: head.sample(hidden),
        }
    with torch.inference_mode():
        return compare(candidates, "dense", rounds=25, seconds=40)


def log_prob_memory(codes: int) -> None:
    """Print the growth of this process's peak, in bytes, over one `log_prob` of 2,048 tokens."""
    head = vq_head(codes)
    hidden, labels = torch.randn(TOKENS, DIM).bfloat16(), torch.randint(VOCAB, (TOKENS,))
    with torch.inference_mode():
        head.log_prob(hidden[:16], labels[:16])
        with peak_memory() as peak:
            head.log_prob(hidden, labels)
    print(json.dumps(peak["bytes"]))


def kmeans_time() -> dict[str, Any]:
    """The size that the package promises: V=151,936, D=1,024, C=4,096."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(2048, 1024, generator=generator)
    chosen = torch.randint(2048, (151_936,), generator=generator)
    points = centers[chosen] + 0.7 * torch.randn(151_936, 1024, generator=generator)
    start = time.perf_counter()
    with peak_memory() as peak:
        kmeans(points, 4096, seed=0)
    seconds = time.perf_counter() - start
    return {
        "points": 151_936,
        "dim": 1024,
        "codes": 4096,
        "seconds": seconds,
        "peak_growth": peak["bytes"],
        "points_bytes": points.numel() * 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log-prob", type=int, help=argparse.SUPPRESS)
    codes = parser.parse_args().log_prob
    torch.manual_seed(0)
    if codes is not None:
        log_prob_memory(codes)
        return
    found: dict[str, Any] = {"vocab": VOCAB, "dim": DIM, "tokens": TOKENS}
    found["kmeans"] = kmeans_time()
    print(found["kmeans"], flush=True)
    for batch in (1, 16):
        found[f"batch_{batch}"] = speed(batch, (16, 100))
        for name, row in found[f"batch_{batch}"].items():
            print(f"batch {batch}, {name}: {row['ms']:.2f} ms, {row['ratio']:.1f}×", flush=True)
    found["log_prob"] = {}
    for divisor in (16, 100):
        command = [sys.executable, __file__, "--log-prob", str(VOCAB // divisor)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown = json.loads(done.stdout)
        dense = TOKENS * VOCAB * 4
        found["log_prob"][f"V/{divisor}"] = {"peak_growth": grown, "dense_logits": dense}
        print(
            f"log_prob V/{divisor}: {grown / 2**20:.0f} MiB, dense logits {dense / 2**20:.0f} MiB"
        )
    write_json(RESULTS / "vq_speed.json", {**found, "provenance": provenance(0)})


if __name__ == "__main__":
    main()
