"""Speed of the compact heads: a decoding step at the size of a 1 B model's head, any number of states, a busy machine.

    python benchmarks/head_speed.py                             # writes benchmarks/results/head_speed.json
    python benchmarks/head_speed.py --only product_vq screened  # measures cases with these in their name, keeps others
    python benchmarks/head_speed.py --part states busy          # measures these parts, keeps the decoding steps

Synthetic weights and codes, V=128,256, D=2,048, bf16. Ratio to the dense bf16 `nn.Linear` in the same process, cold
caches, interleaved, two threads, samples dropped that waited for a core. What is in the codes does not change the
speed; whether a screen finds the right tokens is a matter of quality and not measured here. `limit`: the time to read
the bytes of one step, as a share of the time taken, at the bandwidth of a sum over 512 MiB that takes its turn with the
heads (the median, as for them); `strict_limit`: the same at the bandwidth of its fastest turn.

`states`: 1 to 512 hidden states at the sizes of two small models' heads, fp32 and bf16, in CPU time of one thread,
which other processes on the machine do not change. `busy`: wall time of a step with one and with two threads while
another process keeps a core busy.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from timing import compare

from hf_softheads import heads
from hf_softheads.files import write_json
from hf_softheads.heads.base import HeadSpec
from hf_softheads.kernels import select
from hf_softheads.report.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "head_speed.json"
VOCAB, DIM, CANDIDATES = 128_256, 2_048, 256
SPECS: dict[str, HeadSpec] = {
    **{f"quantized, {bits} bits": heads.Quantized(bits, None) for bits in (8, 4, 3, 2)},
    "transform_coded, 2 bits": heads.TransformCoded(bits=2.0),
    "transform_coded, 1 bit": heads.TransformCoded(bits=1.0),
    "product_vq, 2 bits": heads.ProductVQ(DIM // 4),
    "product_vq, 1 bit": heads.ProductVQ(DIM // 8),
    "product_vq, 1 bit, 16 codes": heads.ProductVQ(DIM // 4, codes=16),
    "product_vq, 1 bit, structured": heads.ProductVQ(DIM // 8, rotation="structured"),
    "product_vq, 2 bits, structured": heads.ProductVQ(DIM // 4, rotation="structured"),
    "product_vq, 1 bit, 16 codes, structured": heads.ProductVQ(DIM // 4, 16, "structured"),
    "low_rank_residual, 4 bits": heads.LowRankResidual(DIM // 16, 4),
    "residual_vq 4 x 1024": heads.ResidualVQ(4, 1024),
    "low_rank D/4": heads.LowRank(DIM // 4),
    "low_rank D/8": heads.LowRank(DIM // 8),
    "low_rank D/4 in 8 bits": heads.LowRank(DIM // 4, heads.Quantized(8)),
    "low_rank D/8 in 8 bits": heads.LowRank(DIM // 8, heads.Quantized(8)),
}
SCREENS = {  # candidates of each
    "transform_coded, 1 bit": CANDIDATES,
    "product_vq, 1 bit, 16 codes": CANDIDATES,
    "product_vq, 1 bit, 16 codes, structured": CANDIDATES,
    "residual_vq 4 x 1024": CANDIDATES,
    "low_rank D/8": CANDIDATES,
    "low_rank D/4 in 8 bits": CANDIDATES,
    "low_rank D/8 in 8 bits": CANDIDATES,
}
PLAIN = ("residual_vq 4 x 1024", "low_rank D/4 in 8 bits", "low_rank D/8 in 8 bits")
OFF = ", no kernels"  # the same without a compiler
MODELS = {"SmolLM2-135M": (49_152, 576), "Gemma-3-270M": (262_144, 640)}
COUNTS = (1, 4, 16, 64, 128, 512)


def specs_of(dim: int) -> dict[str, HeadSpec]:
    """Those that are measured at the sizes of `MODELS`."""
    return {
        "quantized, 4 bits": heads.Quantized(4, None),
        "quantized, 4 bits, groups of 64": heads.Quantized(4, group=64),
        "transform_coded, 4.5 bits": heads.TransformCoded(bits=4.5),
        "transform_coded, 2.25 bits": heads.TransformCoded(bits=2.25),
        "product_vq, 2 bits, structured": heads.ProductVQ(dim // 4, rotation="structured"),
    }


def build(
    spec: HeadSpec, vocab: int = VOCAB, dim: int = DIM, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A head with random parameters and codes."""
    head: Any = spec.module(dim, vocab)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for name, buffer in head.named_buffers():
        buffer.copy_(torch.randint(1024 if buffer.dtype == torch.int16 else 256, buffer.shape))
        if name == "tier_gain":  # rows of one size, tokens of all tiers among each other
            sizes = torch.tensor([stop - start for start, stop in head.ranges])
            tiers = torch.arange(len(sizes)).repeat_interleave(sizes)
            buffer.copy_(tiers[torch.randperm(vocab)] + 16 * 10)
        if name == "bits":  # falling with the column and the tier, as many as there is room for
            fall = (
                torch.linspace(1, -0.2, dim) * 3.2 * spec.bits + torch.linspace(1, -1, 8)[:, None]
            )
            for lower in range(1000):
                buffer.copy_((fall - lower / 100).round().clamp(0, 8))
                if max(p.stop for planes in head.planes() for p in planes) <= len(head.codes):
                    break
    head = head.to(dtype).requires_grad_(False)
    # of the size of a language model's: exp(-100) is a subnormal number, ten times as slow
    head.weight.mul_(2 / head(torch.randn(8, dim).to(dtype)).float().std())
    return head


def screened(screen: Any, candidates: int, dense: nn.Linear) -> Any:
    head = heads.Screened(heads.LowRank(1), 1).module(8, 16)
    head.in_features, head.out_features, head.candidates = DIM, VOCAB, candidates
    head.screen, head.inner = screen, heads.Dense().module(DIM, VOCAB)
    head.inner.weight = dense.weight  # the exact rows are the dense head's own
    head.weight.data.zero_()
    return head.requires_grad_(False)


def greedy(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best token and its normalised log-probability."""
    value, token = scores.max(-1)
    return token, value.float() - scores.float().logsumexp(-1)


def states() -> dict[str, Any]:
    """Ratios to the dense head by model, dtype and number of hidden states."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for model, (vocab, dim) in MODELS.items():
        for dtype in (torch.bfloat16, torch.float32):
            dense = nn.Linear(dim, vocab, bias=False, dtype=dtype).requires_grad_(False)
            built = {name: build(s, vocab, dim, dtype) for name, s in specs_of(dim).items()}
            for count in COUNTS:
                hidden = torch.randn(count, dim).to(dtype)
                functions = {
                    name: lambda h=hidden, f=head: f(h)
                    for name, head in {"dense": dense, **built}.items()
                }
                with torch.inference_mode():
                    timed = compare(
                        functions, "dense", rounds=5, seconds=30, clock=time.thread_time
                    )
                by_dtype = found.setdefault(model, {}).setdefault(str(dtype)[6:], {})
                by_dtype[str(count)] = timed
                told = ", ".join(f"{name} x{row['ratio']:.2f}" for name, row in timed.items())
                print(f"{model} {dtype} {count:>3} states: {told}", flush=True)
    return {
        "clock": "CPU time, 1 thread",
        "shapes": MODELS,
        "kernel": f"C++, {select('quantized').instructions}",
        "speed": found,
        "provenance": provenance(),
    }


def busy() -> dict[str, Any]:
    """Wall time of a step with one thread and with two, turn by turn, while another process keeps a core busy."""
    model = "SmolLM2-135M"
    vocab, dim = MODELS[model]
    dense = nn.Linear(dim, vocab, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    built = {"dense": dense, **{n: build(s, vocab, dim) for n, s in specs_of(dim).items()}}
    hidden = torch.randn(1, dim).bfloat16()
    found: dict[str, dict[str, float]] = {}
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for name, head in built.items():
            taken: dict[int, list[float]] = {1: [], 2: []}
            with torch.inference_mode():
                for turn in range(120):
                    threads = 1 + turn // 10 % 2
                    torch.set_num_threads(threads)
                    start = time.perf_counter()
                    head(hidden)
                    taken[threads].append(1e3 * (time.perf_counter() - start))
            found[name] = {
                f"{n} thread{'s' * (n > 1)}": statistics.median(ms) for n, ms in taken.items()
            }
            print(f"busy: {name:<34} {found[name]}", flush=True)
    finally:
        other.kill()
        other.wait()
    return {
        "model": model,
        "kernel": f"C++, {select('quantized').instructions}",
        "ms": found,
        "provenance": provenance(),
    }


PARTS = {"states": states, "busy": busy}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="parts of the names of cases of a decoding step")
    parser.add_argument("--part", nargs="+", choices=["steps", *PARTS], default=["steps", *PARTS])
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "steps" in arguments.part:
        kept |= steps(arguments, kept.get("speed", {}) if arguments.only else {})
        write_json(RESULTS, kept)
    for part in PARTS:
        if part in arguments.part:
            kept[part] = PARTS[part]()
            write_json(RESULTS, kept)


def steps(arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """Decoding steps, added to what was `found` before."""
    torch.set_num_threads(arguments.threads)
    dense = nn.Linear(DIM, VOCAB, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    data = torch.ones(2**27)  # of zeros there would be a single page
    built: dict[str, Any] = {}
    cases: dict[str, tuple[Any, Any]] = {}  # head, function of hidden states
    for name, spec in SPECS.items():
        ways = [f"{name}, all scores"]
        if name in SCREENS:
            way = f"screened by {name}, greedy token and its log-probability"
            ways += [way, way + OFF] if name in PLAIN else [way]
        ways = [way for way in ways if not arguments.only or any(o in way for o in arguments.only)]
        if not ways:
            continue
        head = built[name] = build(spec)
        for way in ways:
            if way.startswith("screened"):
                off = way.endswith(OFF)
                both = screened(copy.deepcopy(head) if off else head, SCREENS[name], dense)
                both.use_kernels("off" if off else "auto")
                cases[way] = both, lambda h, head=both: head.topk_log_prob(h, 1)
            else:
                cases[way] = head, head
    bandwidth: dict[str, dict[str, float]] = {}
    for batch in (1, 16):
        hidden = torch.randn(batch, DIM).bfloat16()
        functions: dict[str, Any] = {
            "dense": lambda h=hidden: dense(h),
            "dense, greedy token and its log-probability": lambda h=hidden: greedy(dense(h)),
            **{name: lambda h=hidden, f=function: f(h) for name, (_, function) in cases.items()},
            "read": data.sum,
        }
        with torch.inference_mode():
            timed = compare(functions, "dense", rounds=9, seconds=30)
        read = timed.pop("read")
        rate = {way: 1e3 * data.numel() * 4 / read[way] for way in ("ms", "fastest")}
        bandwidth[f"batch {batch}"] = {"median": rate["ms"], "fastest": rate["fastest"]}
        for name, row in timed.items():
            size = cases[name][0].bytes_read if name in cases else dense.weight.numel() * 2
            row |= {
                "bytes_read": size,
                "limit": size / rate["ms"] / (row["ms"] / 1e3),
                "strict_limit": size / rate["fastest"] / (row["ms"] / 1e3),
            }
            row["path"] = cases[name][0].backend if name in cases else "torch"
            print(
                f"batch {batch:>2}  {name:<62} {row['ms']:8.3f} ms  x{row['ratio']:.1f}  "
                f"{row['limit']:.0%} {row['strict_limit']:.0%} of its limit",
                flush=True,
            )
        found[f"batch {batch}"] = {**found.get(f"batch {batch}", {}), **timed}
    kernel = select("quantized")
    return {
        "shape": [VOCAB, DIM],
        "dtype": "bfloat16",
        "clock": f"wall time, {arguments.threads} threads",
        "kernel": kernel.reason or f"C++, {kernel.instructions}",
        "bandwidth": bandwidth,
        "speed": found,
        "provenance": provenance(arguments.seed),
    }


if __name__ == "__main__":
    main()
