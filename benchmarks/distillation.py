"""Which loss repairs a head best: the same VQ head, data, steps and optimizer, one row a loss.

    python benchmarks/distillation.py    # some minutes on two cores; writes benchmarks/results/distillation.json

On the embedded model; perplexity, KL and top-1 agreement on held-out modules of the standard library. Every loss is
tried at every learning rate of `--rates` and shown at its own best.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import hf_softheads as sh
from hf_softheads import losses
from hf_softheads.corpus import stdlib_documents
from hf_softheads.data import windows
from hf_softheads.embedded import load_embedded
from hf_softheads.heads import VQ
from hf_softheads.losses.base import LossSpec
from hf_softheads.repair import cache_states, repair_head
from hf_softheads.results import provenance, write_json
from hf_softheads.tables import Table

RESULTS = Path(__file__).parent / "results" / "distillation.json"
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
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model, tokenizer = load_embedded()
    window = model.config.max_position_embeddings
    train = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(given.seed)
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=window)
    held_out = held_out.shuffled(given.seed).head(16_384)
    stats = sh.collect(model, train.head(65_536))
    states = cache_states(model, train.input_ids, tokens=given.steps * 2048, seed=given.seed)
    dense = copy.deepcopy(model)
    codes = model.config.vocab_size // 8
    patched = sh.patch(model, head=VQ.repaired(codes), stats=stats)
    teacher = sh.dense_head(patched)
    start = copy.deepcopy(patched.get_output_embeddings().state_dict())

    def measure() -> dict[str, Any]:
        return asdict(sh.evaluate(patched, held_out, reference=dense))

    rows: dict[str, Any] = {"before": measure()}
    for name, mix in MIXES.items():
        found = []
        for rate in given.rates:
            patched.get_output_embeddings().load_state_dict(start)
            asked = None if name == LABELS else teacher
            repair_head(
                patched, asked, states, steps=given.steps, lr=rate, losses=mix, seed=given.seed
            )
            found.append({"lr": rate, **measure()})
        rows[name] = min(found, key=lambda row: row["perplexity"])
        print(name, rows[name]["perplexity"], flush=True)
    settings = {"steps": given.steps, "tokens_a_step": 2048, "rates": given.rates, "codes": codes}
    write_json(RESULTS, {"settings": settings, "rows": rows, "provenance": provenance(given.seed)})
    table = Table(["loss", "perplexity", "KL", "top-1", "learning rate"])
    for name, row in rows.items():
        rate = f"{row['lr']:g}" if "lr" in row else ""
        table.add(name, f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}", rate)
    print(table)


if __name__ == "__main__":
    main()
