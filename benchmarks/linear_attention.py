"""Speed of the variants with a recurrent state against torch's fused softmax attention.

    python benchmarks/linear_attention.py     # about five minutes; writes benchmarks/results/linear_attention.json

Batch 1, heads of 64 (2 in training, 8 in decoding), causal, fp32, CPU time of one thread, all candidates in turn in one
process; ratios to `scaled_dot_product_attention`. Training: forward and backward of a whole text, feature maps
included. Decoding: one token after a text of some length, whose keys the baseline holds and the others have in their
state.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from timing import compare

import hf_softheads as sh
from hf_softheads.attention.base import AttentionSpec, attend
from hf_softheads.attention.call import Geometry, State
from hf_softheads.files import write_json
from hf_softheads.report.provenance import provenance

RESULTS = Path(__file__).parent / "results"
DIM, WIDTH = 64, 256
BASELINE = "scaled_dot_product_attention"
sa = sh.attention
SPECS: list[AttentionSpec] = [  # 64 features each
    sa.EluLinear(),
    sa.Hedgehog(features=32),
    sa.FeedForwardKernel(),
    sa.LearnedKernel(),
    sa.DecayLinear(),
    sa.GatedDelta(),
    sa.LoLCATs(features=32),
]


def training(length: int, heads: int = 2) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, length, DIM, generator=generator) for _ in range(3)]
    hidden = torch.randn(1, length, WIDTH, generator=generator)
    grad = torch.randn(1, heads, length, DIM, generator=generator)

    def bind(function: Callable[..., Any], params: dict[str, Any]) -> Callable[[], Any]:
        leaves = [t.requires_grad_() for t in (*inputs, *params.values())]
        return lambda: torch.autograd.grad(function(*inputs), leaves, grad)

    found = {
        BASELINE: bind(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), {})
    }
    for spec in SPECS:
        params = spec.init_params(Geometry(heads, heads, DIM, WIDTH))
        given = {"params": params, "hidden": hidden if spec.needs_hidden else None}
        found[spec.name] = bind(lambda *x, s=spec, g=given: attend(s, *x, **g), params)
    return found


@torch.no_grad()
def decoding(length: int, heads: int = 8) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    text = [torch.randn(1, heads, length, DIM, generator=generator) for _ in range(3)]
    token = [x[:, :, -1:] for x in text]
    hidden = torch.randn(1, length, WIDTH, generator=generator)

    @torch.no_grad()
    def softmax() -> Any:
        return F.scaled_dot_product_attention(token[0], text[1], text[2])

    found: dict[str, Callable[[], Any]] = {BASELINE: softmax}
    for spec in SPECS:
        params, state = spec.init_params(Geometry(heads, heads, DIM, WIDTH)), State()
        seen = hidden if spec.needs_hidden else None
        attend(spec, *text, params=params, hidden=seen, state=state)
        last = None if seen is None else seen[:, -1:]

        @torch.no_grad()
        def step(spec: Any = spec, params: Any = params, state: Any = state, x: Any = last) -> Any:
            return attend(spec, *token, params=params, hidden=x, state=state)

        found[spec.name] = step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="at most, for each timing")
    seconds = parser.parse_args().seconds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for kind, make, lengths, rounds in (
        ("training", training, (4096, 16384), 3),
        ("decoding", decoding, (512, 2048, 16384), 60),
    ):
        for length in lengths:
            timed = compare(
                make(length),
                BASELINE,
                rounds=rounds,
                seconds=seconds,
                cold=False,
                clock=time.thread_time,
            )
            for name, numbers in timed.items():
                rows.append({"kind": kind, "variant": name, "length": length, **numbers})
                print(
                    f"{kind} {length:6} {name:30s} {numbers['ms']:9.3f} ms × {numbers['ratio']:.2f}"
                )
    found = {
        "provenance": provenance(seed=0),
        "shape": {
            "batch": 1,
            "heads": {"training": 2, "decoding": 8},
            "head_dim": DIM,
            "features": 64,
            "causal": True,
        },
        "clock": "CPU time of one thread",
        "rows": rows,
    }
    write_json(RESULTS / "linear_attention.json", found)


if __name__ == "__main__":
    main()
