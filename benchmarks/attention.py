"""Speed of every attention variant against torch's fused softmax, and what it does to a model that never saw it.

    python benchmarks/attention.py            # about six minutes; writes benchmarks/results/attention.json and .png

Speed: batch 1, 16 heads of 64, causal, fp32 and bf16, CPU time of one thread; ratio to torch's own
`scaled_dot_product_attention` in the same process, forward and forward + backward. Quality: perplexity of the embedded
model on held-out text when the variant replaces the softmax of every layer without any training, and its attention
sinks.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entmax
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from timing import compare

import hf_softheads as sh
from hf_softheads.attention.base import AttentionSpec, attend
from hf_softheads.attention.call import Geometry
from hf_softheads.attention.softpick import Softpick
from hf_softheads.files import write_json
from hf_softheads.registry import variants
from hf_softheads.report.plots import plot_ratios
from hf_softheads.report.provenance import provenance
from hf_softheads.text.embedded import load_embedded
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows

RESULTS = Path(__file__).parent / "results"
HEADS, DIM, WIDTH = 16, 64, 1024
CAUSAL = {name: cls for name, cls in variants("attention").items() if name != "soft"}
BASELINE = "scaled_dot_product_attention"


def eager(row_map: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention as it is usually published: the whole matrix, an additive mask, autograd."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        scores = (query @ key.mT * DIM**-0.5).masked_fill(~mask, -torch.inf)
        return row_map(scores) @ value

    return run


PEERS: dict[str, Callable[..., Tensor]] = {
    BASELINE: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "eager softmax": eager(lambda z: z.softmax(-1)),
    "sparsemax of the entmax package": eager(lambda z: entmax.sparsemax(z, dim=-1)),
    "entmax15 of the entmax package": eager(lambda z: entmax.entmax15(z, dim=-1)),
}


def candidates(length: int, train: bool, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = [normal(1, HEADS, length, DIM) for _ in range(3)]
    hidden, grad = normal(1, length, WIDTH), normal(1, HEADS, length, DIM)
    geometry = sh.attention.base.Geometry(HEADS, HEADS, DIM, WIDTH)

    def bind(function: Callable[..., Tensor], params: dict[str, Tensor]) -> Callable[[], Any]:
        if not train:
            return torch.no_grad()(lambda: function(*inputs))
        leaves = [t.requires_grad_() for t in (*inputs, *params.values())]
        return lambda: torch.autograd.grad(function(*inputs), leaves, grad, allow_unused=True)

    found = {name: bind(function, {}) for name, function in PEERS.items()}
    for name, cls in CAUSAL.items():
        spec: Any = cls()
        params = spec.init_params(geometry)
        given = {"params": params, "hidden": hidden if spec.needs_hidden else None}

        def run(q: Tensor, k: Tensor, v: Tensor, spec: Any = spec, given: Any = given) -> Tensor:
            return attend(spec, q, k, v, **given)

        found[name] = bind(run, params)
    return found


def speeds(seconds: float) -> list[dict[str, Any]]:
    rows = []
    for length, dtype in ((1024, "float32"), (2048, "float32"), (2048, "bfloat16")):
        for train in (False, True):
            timed = compare(
                candidates(length, train, getattr(torch, dtype)),
                BASELINE,
                rounds=5,
                seconds=seconds,
                cold=False,
                clock=time.thread_time,
            )
            for name, numbers in timed.items():
                case = {"variant": name, "length": length, "train": train, "dtype": dtype}
                rows.append({**case, **numbers})
                print(f"{name:32s} T={length} {dtype} train={train!s:5} {numbers['ratio']:.2f}")
    return rows


def quality() -> list[dict[str, Any]]:
    model, tokenizer = load_embedded()
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=512)
    rows = held_out.input_ids[:12]

    def loss() -> float:
        with torch.no_grad():
            return sum(float(model(part, labels=part).loss) for part in rows.split(4)) / 3

    base = loss()
    cases: list[tuple[AttentionSpec, list[int] | None]] = [(cls(), None) for cls in CAUSAL.values()]
    cases += [
        (sh.attention.TopK(k=64), [2, 3]),
        (sh.attention.TopK(k=256), None),
        (sh.attention.SSMax(bias=True), None),
        (sh.attention.Sigmoid(row_bias="lse"), None),
    ]
    found = []
    for spec, layers in cases:
        torch.manual_seed(0)
        sh.patch(model, attention=spec, layers=layers)
        ratio = math.exp(loss() - base)
        facts = sh.diagnose(model, rows[:4])
        sh.unpatch(model)
        entropy = [h for layer in facts.relative_entropy for h in layer]
        found.append(
            {
                "variant": spec.to_dict(),
                "layers": layers,
                "perplexity_ratio": ratio,
                "sink_rate": facts.sink_rate,
                "relative_entropy": sum(entropy) / len(entropy),
                "zeros": sum(map(sum, facts.zeros)) / len(entropy),
            }
        )
        print(f"{spec} {layers or ''} perplexity × {ratio:.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60, help="at most, for each of six timings"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {
        "provenance": provenance(seed=0),
        "shape": {"batch": 1, "heads": HEADS, "head_dim": DIM, "causal": True},
        "path": str(Softpick().module(Geometry(2, 2, 64, 128)).engines(torch.zeros(()))[0]),
        "clock": "CPU time of one thread",
        "quality": quality(),
        "speed": speeds(arguments.seconds),
    }
    write_json(RESULTS / "attention.json", found)
    bars = {
        row["variant"]: row["ratio"]
        for row in found["speed"]
        if row["length"] == 2048 and not row["train"] and row["dtype"] == "float32"
    }
    plot_ratios(
        bars,
        RESULTS / "attention.png",
        "speed ÷ torch's fused attention (2,048 tokens, fp32, forward)",
        "attention variants, CPU",
    )


if __name__ == "__main__":
    main()
