"""What label smoothing does to a model's confidence, and what repairs it.

    python benchmarks/confidence.py    # some minutes on two cores; writes results/confidence.json and .png

Twice, with cross-entropy and with label smoothing, the same steps, data and optimizer. `vocabulary`: the embedded
model's own head, trained further on cached hidden states. `classes`: where the next token is one of the 64 most
frequent, a two-layer classifier of the same states, trained from scratch until it knows its data: the setting of
arXiv 2403.14715, few classes and small training error. Each ranks its own answers on held-out modules of the standard
library by several scores. The p-norm's power and the temperature are chosen on one half of the held-out text,
everything is reported on the other.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_softheads as sh
from hf_softheads import losses
from hf_softheads.bridge import SplitModel
from hf_softheads.files import write_json
from hf_softheads.measure import confidence
from hf_softheads.report.plots import plot_curves
from hf_softheads.report.provenance import provenance
from hf_softheads.text.embedded import load_embedded
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows
from hf_softheads.training.cached_states import cache_states
from hf_softheads.training.distill_head import repair_head

RESULTS = Path(__file__).parent / "results" / "confidence.json"
SMOOTHING = (0.0, 0.1, 0.3, 0.5)
POWERS = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)
TEMPERATURES = (0.25, 0.35, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
CLASSES, CLASSIFIED, EPOCHS = 64, 50_000, 20
TOKENS = 12_288  # with scores of all the vocabulary
SHOWN = (
    "smoothing 0: msp",
    "smoothing 0.5: msp",
    "smoothing 0.5: msp, temperature",
    "smoothing 0.5: p_norm",
)
POINTS = 100  # of a curve in the results file


def trained_head(model: Any, start: Any, states: Any, alpha: float, given: Any) -> Any:
    """The logits of the model's own head, trained further with label smoothing, as a function of hidden states."""
    model.get_output_embeddings().load_state_dict(start)
    mix = {losses.LabelSmoothing(alpha): 1.0}
    repair_head(model, None, states, steps=given.steps, lr=given.lr, losses=mix)
    return SplitModel(model).logits


def trained_classifier(states: Tensor, labels: Tensor, alpha: float, given: Any) -> Any:
    """The logits of a two-layer classifier of hidden states, trained from scratch until it knows its data."""
    torch.manual_seed(given.seed)
    mean, scale = states.mean(0), states.std(0)
    net = nn.Sequential(nn.Linear(states.shape[1], 512), nn.GELU(), nn.Linear(512, CLASSES))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = EPOCHS * len(states) // 512
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(states), (512,))
        logits = net((states[chosen] - mean) / scale)
        F.cross_entropy(logits, labels[chosen], label_smoothing=alpha).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return lambda h: net((h - mean) / scale)


@torch.no_grad()
def measured(logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Areas and curves on the second half; `p` and temperature are chosen on the first."""
    half = len(labels) // 2
    right = logits.argmax(-1) == labels
    power = confidence.best_setting(confidence.p_norm, logits[:half], right[:half], POWERS)
    heat = confidence.best_setting(confidence.msp, logits[:half], right[:half], TEMPERATURES)
    logits, labels, right = logits[half:], labels[half:], right[half:]
    scores = {
        "msp": confidence.msp(logits),
        "msp, temperature": confidence.msp(logits, heat),
        "max_logit": confidence.max_logit(logits),
        "energy": confidence.energy(logits),
        "p_norm": confidence.p_norm(logits, power),
    }
    found = {name: confidence.risk_coverage(score, right) for name, score in scores.items()}
    row = {
        "p": power,
        "temperature": heat,
        "tokens": len(labels),
        "perplexity": float(F.cross_entropy(logits, labels).exp()),
        "accuracy": float(right.float().mean()),
        "aurc": {name: curve.aurc for name, curve in found.items()},
        "excess": {name: curve.excess for name, curve in found.items()},
        "risk_at_half": {name: curve.at(0.5) for name, curve in found.items()},
    }
    step = len(labels) // POINTS
    return row, {name: curve.risk[step - 1 :: step].tolist() for name, curve in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    source = provenance(given.seed)
    model, tokenizer = load_embedded()
    window = model.config.max_position_embeddings
    train = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(given.seed)
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=window).shuffled(given.seed)
    states = cache_states(model, train.input_ids, tokens=120_000, seed=given.seed)
    hidden, labels = cache_states(model, held_out.input_ids, tokens=40_000, seed=given.seed)
    common = torch.bincount(states[1]).topk(CLASSES).indices
    place = torch.full((model.config.vocab_size,), -1).index_copy(0, common, torch.arange(CLASSES))
    known = [place[y] >= 0 for y in (states[1], labels)]
    few = states[0][known[0]][:CLASSIFIED], place[states[1][known[0]]][:CLASSIFIED]
    sh.patch(model, head=sh.heads.Dense())
    start = copy.deepcopy(model.get_output_embeddings().state_dict())

    rows: dict[str, dict[str, Any]] = {"vocabulary": {}, "classes": {}}
    curves: dict[str, dict[str, Any]] = {"vocabulary": {}, "classes": {}}
    for alpha in SMOOTHING:
        logits = trained_head(model, start, states, alpha, given)
        ways = {"vocabulary": (logits, hidden[:TOKENS], labels[:TOKENS])}
        logits = trained_classifier(*few, alpha, given)
        ways["classes"] = logits, hidden[known[1]], place[labels[known[1]]]
        for name, (function, h, y) in ways.items():
            with torch.no_grad():
                rows[name][str(alpha)], found = measured(function(h), y)
            curves[name] |= {f"smoothing {alpha:g}: {k}": v for k, v in found.items()}
            print(name, alpha, rows[name][str(alpha)], flush=True)
    settings = {"steps": given.steps, "lr": given.lr, "classes": CLASSES, "epochs": EPOCHS}
    found_all = {"settings": settings, "rows": rows, "curves": curves}
    write_json(RESULTS, {**found_all, "provenance": source})
    plot_curves(
        {k: v for k, v in curves["classes"].items() if k in SHOWN},
        RESULTS.with_suffix(".png"),
        xlabel="share of the tokens answered",
        ylabel="share of those that are wrong",
        title=f"Mistakes by coverage, {CLASSES} classes",
    )


if __name__ == "__main__":
    main()
