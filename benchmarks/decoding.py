"""What `generate` costs a token by plain decoding and by candidates.

    python benchmarks/decoding.py FOLDER … --heads dense quantized screened    # writes results/decoding.json

Each model, bf16 on one thread, with each head: a prompt of 4 tokens and `--new` more, in every mode, plain `generate`
and `custom_generate=sh.decoding.candidates` in turns. The thread's own time counts, not what it waits for a core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import compare
from transformers import AutoModelForCausalLM

import hf_softheads as sh
from hf_softheads.files import write_json
from hf_softheads.report.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "decoding.json"
PROMPT = 4
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "greedy, repetition penalty": {"do_sample": False, "repetition_penalty": 1.2},
    "sampling": {"do_sample": True, "top_k": 0},
    "top-k 50": {"do_sample": True, "top_k": 50},
    "top-p 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "min-p 0.05": {"do_sample": True, "top_k": 0, "min_p": 0.05},
}


def heads(dim: int) -> dict[str, Any]:
    return {
        "dense": sh.heads.Dense(),
        "quantized": sh.heads.Quantized(4),
        "screened": sh.heads.Screened(screen=sh.heads.LowRank(dim // 4), candidates=1024),
    }


def measure(model: Any, batch: int, given: argparse.Namespace) -> dict[str, Any]:
    new = given.new
    vocab = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab // 100, vocab, (batch, PROMPT), generator=generator)
    options = {"max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}

    def run(mode: dict[str, Any], own: bool) -> Callable[[], Any]:
        how = {"custom_generate": sh.decoding.candidates} if own else {}
        return lambda: model.generate(ids, **options, **mode, **how)

    rows = {}
    for name in given.modes:
        mode = MODES[name]
        torch.manual_seed(0)
        cases = {"plain": run(mode, False), "candidates": run(mode, True)}
        found = compare(
            cases,
            "plain",
            rounds=given.rounds,
            seconds=given.seconds,
            cold=False,
            clock=time.thread_time,
        )
        rows[name] = {
            "plain_ms": found["plain"]["ms"] / new,
            "candidates_ms": found["candidates"]["ms"] / new,
            "ratio": found["candidates"]["ratio"],
            "low": found["candidates"]["low"],
            "high": found["candidates"]["high"],
        }
        print(f"  batch {batch}, {name}: {rows[name]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--heads", nargs="+", default=["dense", "quantized", "screened"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=120, help="of each mode, at most")
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = provenance(0)  # before anything is written
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for folder in given.folders:
        for name in given.heads:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
            sh.patch(model, head=heads(model.get_output_embeddings().in_features)[name])
            for batch in given.batches:
                print(f"{folder.name}, {name}", flush=True)
                key = f"{folder.name}, {name}, batch {batch}"
                found["rows"][key] = measure(model, batch, given)
                settings = {"prompt": PROMPT, "new": given.new, "rounds": given.rounds}
                write_json(RESULTS, {**found, "settings": settings, "provenance": source})


if __name__ == "__main__":
    main()
