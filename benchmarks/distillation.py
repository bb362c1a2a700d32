"""Which loss repairs a head best: the same VQ head, data, steps and optimizer, one row a loss at its own best rate.

    python benchmarks/distillation.py    # a quarter of an hour on one core; writes benchmarks/results/distillation.json

On the embedded model. Every loss is tried for `--trial` steps at every rate of `--rates`; the one with the lowest
perplexity on windows kept apart from training is taken for the run of `--steps` from the same start, which is measured
on held-out modules of the standard library.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import hf_softheads as sh
from hf_softheads import losses
from hf_softheads.files import write_json
from hf_softheads.heads import VQ
from hf_softheads.losses.base import LossSpec
from hf_softheads.plan import dense_head
from hf_softheads.report.provenance import provenance
from hf_softheads.report.tables import Table
from hf_softheads.text.embedded import load_embedded
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows
from hf_softheads.training.cached_states import cache_states
from hf_softheads.training.distill_head import repair_head

RESULTS = Path(__file__).parent / "results" / "distillation.json"
BATCH, TUNING = 1024, 16_384  # hidden states
LABELS = "cross_entropy (labels only)"
MIXES: dict[str, dict[LossSpec | str, float]] = {
    LABELS: {losses.CrossEntropy(): 1.0},
    "kl": {losses.KL(): 1.0},
    "kl, temperature 2": {losses.KL(temperature=2.0): 1.0},
    "kl + 0.1 cross_entropy": {losses.KL(): 1.0, losses.CrossEntropy(): 0.1},
    "reverse_kl": {losses.ReverseKL(): 1.0},
    "jsd": {losses.JSD(): 1.0},
    "akl": {losses.AKL(): 1.0},
    "nkd": {losses.NKD(): 1.0},
    "pld": {losses.PLD(k=256): 1.0},
    "top_k_kl, 64 tokens": {losses.TopKKL(k=64): 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--trial", type=int, default=40)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model, tokenizer = load_embedded()
    window = model.config.max_position_embeddings
    text = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(given.seed)
    apart = TUNING // window
    tuning = cache_states(model, text.input_ids[:apart], tokens=TUNING)
    train = text.input_ids[apart:]
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=window)
    held_out = held_out.shuffled(given.seed).head(32_768)
    stats = sh.collect(model, [{"input_ids": train[: 65_536 // window]}])
    states = cache_states(model, train, tokens=given.steps * BATCH, seed=given.seed)
    dense = copy.deepcopy(model)
    codes = model.config.vocab_size // 8
    patched = sh.patch(model, head=VQ.repaired(codes), stats=stats)
    teacher = dense_head(patched)
    start = copy.deepcopy(patched.get_output_embeddings().state_dict())
    likelihood = sh.Objective(patched, {"cross_entropy": 1.0})

    def repaired(name: str, steps: int, rate: float) -> None:
        patched.get_output_embeddings().load_state_dict(start)
        asked = None if name == LABELS else teacher
        repair_head(
            patched,
            asked,
            states,
            steps=steps,
            batch_size=BATCH,
            lr=rate,
            losses=MIXES[name],
            seed=given.seed,
        )

    def tuned(name: str, rate: float) -> float:
        repaired(name, given.trial, rate)
        with torch.no_grad():
            return math.exp(likelihood.from_hidden(*tuning))

    def measure() -> dict[str, Any]:
        return asdict(sh.evaluate(patched, held_out, reference=dense))

    rows: dict[str, Any] = {"before": measure()}
    for name in MIXES:
        trials = {rate: tuned(name, rate) for rate in given.rates}
        rate = min(trials, key=trials.__getitem__)
        repaired(name, given.steps, rate)
        rows[name] = {"lr": rate, "trials": {f"{k:g}": v for k, v in trials.items()}, **measure()}
        print(name, rows[name], flush=True)
    settings = {
        "steps": given.steps,
        "trial_steps": given.trial,
        "tokens_a_step": BATCH,
        "tuning_tokens": len(tuning[1]),
        "rates": given.rates,
        "codes": codes,
    }
    write_json(RESULTS, {"settings": settings, "rows": rows, "provenance": provenance(given.seed)})
    table = Table(["loss", "perplexity", "KL", "top-1", "learning rate"])
    for name, row in rows.items():
        rate = f"{row['lr']:g}" if "lr" in row else ""
        table.add(name, f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}", rate)
    print(table)


if __name__ == "__main__":
    main()
