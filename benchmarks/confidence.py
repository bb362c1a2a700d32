"""What label smoothing does to a model's confidence, and what repairs it.

    python benchmarks/confidence.py    # some minutes on two cores; writes results/confidence.json and .png

The embedded model's head is trained further on cached hidden states, with cross-entropy or with label smoothing (the
same steps, data and optimizer), and each ranks its own greedy tokens on held-out modules of the standard library by
several scores. The p-norm's power and the temperature are chosen on one half of the held-out text, everything is
reported on the other.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

import hf_softheads as sh
from hf_softheads import confidence, losses
from hf_softheads.bridge import Reader
from hf_softheads.confidence import best_setting as best
from hf_softheads.corpus import stdlib_documents
from hf_softheads.data import windows
from hf_softheads.embedded import load_embedded
from hf_softheads.plots import plot_curves
from hf_softheads.repair import cache_states, repair_head
from hf_softheads.results import provenance, write_json
from hf_softheads.tables import Table

RESULTS = Path(__file__).parent / "results" / "confidence.json"
SMOOTHING = (0.0, 0.1, 0.3, 0.5)
POWERS = (2, 4, 6, 8, 10, 12)
TEMPERATURES = (0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
SHOWN = (
    "smoothing 0: msp",
    "smoothing 0.5: msp",
    "smoothing 0.5: msp, temperature",
    "smoothing 0.5: p_norm",
)
POINTS = 100  # of a curve in the results file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    model, tokenizer = load_embedded()
    window = model.config.max_position_embeddings
    train = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(given.seed)
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=window).shuffled(given.seed)
    states = cache_states(model, train.input_ids, tokens=given.steps * 512, seed=given.seed)
    hidden, labels = cache_states(model, held_out.input_ids, tokens=12_288, seed=given.seed)
    half = len(labels) // 2
    sh.patch(model, head=sh.heads.Dense())
    start = copy.deepcopy(model.get_output_embeddings().state_dict())

    rows: dict[str, Any] = {}
    curves = {}
    for alpha in SMOOTHING:
        model.get_output_embeddings().load_state_dict(start)
        mix = {losses.LabelSmoothing(alpha): 1.0}
        repair_head(model, None, states, steps=given.steps, lr=given.lr, losses=mix)
        with torch.no_grad():
            logits = Reader(model).logits(hidden)
        right = logits.argmax(-1) == labels
        power = best(confidence.p_norm, logits[:half], right[:half], POWERS)
        heat = best(confidence.msp, logits[:half], right[:half], TEMPERATURES)
        scores = {
            "msp": confidence.msp,
            "msp, temperature": lambda z, t=heat: confidence.msp(z, t),
            "max_logit": confidence.max_logit,
            "energy": confidence.energy,
            "p_norm": lambda z, p=power: confidence.p_norm(z, p),
        }
        found = {
            name: confidence.risk_coverage(score(logits[half:]), right[half:])
            for name, score in scores.items()
        }
        loss = torch.nn.functional.cross_entropy(logits[half:], labels[half:])
        rows[str(alpha)] = {
            "p": power,
            "temperature": heat,
            "perplexity": float(loss.exp()),
            "accuracy": float(right[half:].float().mean()),
            "aurc": {name: curve.aurc for name, curve in found.items()},
            "excess": {name: curve.excess for name, curve in found.items()},
            "risk_at_half": {name: curve.at(0.5) for name, curve in found.items()},
        }
        for name in ("msp", "msp, temperature", "p_norm"):
            picked = found[name].risk[
                len(found[name].risk) // POINTS - 1 :: len(right[half:]) // POINTS
            ]
            curves[f"smoothing {alpha:g}: {name}"] = picked.tolist()
        print(alpha, rows[str(alpha)], flush=True)
    settings = {"steps": given.steps, "lr": given.lr, "tokens": len(labels) - half}
    found_all = {"settings": settings, "rows": rows, "curves": curves}
    write_json(RESULTS, {**found_all, "provenance": provenance(given.seed)})
    plot_curves(
        {k: v for k, v in curves.items() if k in SHOWN},
        RESULTS.with_suffix(".png"),
        xlabel="share of the tokens answered",
        ylabel="share of those that are wrong",
        title="How well confidence ranks mistakes, head trained with label smoothing",
    )
    table = Table(["smoothing", *scores, "p"])
    for name, row in rows.items():
        table.add(name, *(f"{value:.4f}" for value in row["aurc"].values()), f"{row['p']:g}")
    print(table)


if __name__ == "__main__":
    main()
