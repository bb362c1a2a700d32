"""Time and memory of a training loss over a huge vocabulary, forward and backward.

    python benchmarks/losses.py    # some minutes on two cores; writes benchmarks/results/losses.json and losses.png
    python benchmarks/losses.py --only statistics    # the rows whose names contain it, beside those of the last run

Every method runs in a process of its own, once a round, in shuffled order; times are ratios to whole logits within a
round, memory is the growth of the process' peak (Linux). `cut_cross_entropy` is measured where it can be imported.
Gradients are compared with float64 on a smaller problem.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_softheads as sh
from hf_softheads import losses
from hf_softheads.files import write_json
from hf_softheads.heads import VQ
from hf_softheads.measure.memory import peak_memory
from hf_softheads.report.provenance import provenance
from hf_softheads.report.tables import Table
from hf_softheads.training.token_statistics import token_statistics

RESULTS = Path(__file__).parent / "results"
TOKENS, VOCAB, DIM = 2048, 128_256, 1024
WHOLE = "whole logits (transformers)"
WHOLE_STATISTICS = "whole logits: token statistics"
LEAN = 2**25  # bytes of logits


def problem(tokens: int, vocab: int, dim: int) -> tuple[Tensor, nn.Parameter, Tensor]:
    """Hidden states, output rows and labels, bf16."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, dim, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, dim, generator=g) * dim**-0.5).bfloat16()
    return hidden, nn.Parameter(weight), torch.randint(vocab, (tokens,), generator=g)


def bare_model(weight: nn.Parameter) -> LlamaForCausalLM:
    """A model of which only the head matters."""
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=len(weight),
            hidden_size=weight.shape[1],
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=8,
            intermediate_size=8,
            tie_word_embeddings=False,
        )
        model = LlamaForCausalLM(config)
    model.lm_head.weight = weight
    return model


Loss = Callable[[], Tensor]
Prepare = Callable[[Tensor, Tensor, Tensor], Loss]


def whole(h: Tensor, w: Tensor, y: Tensor) -> Loss:
    return lambda: F.cross_entropy((h @ w.T).float(), y)


def torch_plain(h: Tensor, w: Tensor, y: Tensor) -> Loss:
    return lambda: F.linear_cross_entropy(h, w, y)


def torch_chunked(h: Tensor, w: Tensor, y: Tensor) -> Loss:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    return lambda: F.linear_cross_entropy(h, w, y, options=LinearCrossEntropyOptions())


def cut(h: Tensor, w: Tensor, y: Tensor) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(h, w, y, impl="torch_compile")


def teacher(w: Tensor) -> Tensor:
    """The output rows, a little different."""
    return (w.detach() * 1.25).to(w.dtype)


def whole_kl(h: Tensor, w: Tensor, y: Tensor) -> Loss:
    theirs = teacher(w)

    def loss() -> Tensor:
        student, target = ((h @ x.T).float().log_softmax(-1) for x in (w, theirs))
        return F.kl_div(student, target.detach(), log_target=True, reduction="batchmean")

    return loss


def wider(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and output rows of a teacher twice as wide, with the scores of `teacher`."""
    return torch.cat([h.detach()] * 2, -1), torch.cat([(w.detach() * 0.625).to(w.dtype)] * 2, -1)


def whole_from_wider(loss: losses.base.LossSpec) -> Callable[[Tensor, Tensor, Tensor], Loss]:
    def prepare(h: Tensor, w: Tensor, y: Tensor) -> Loss:
        states, rows = wider(h, w)
        return lambda: loss.per_token((h @ w.T).float(), y, (states @ rows.T).float()).mean()

    return prepare


def lean_from_wider(loss: losses.base.LossSpec) -> Callable[[Tensor, Tensor, Tensor], Loss]:
    def prepare(h: Tensor, w: Tensor, y: Tensor) -> Loss:
        states, rows = wider(h, w)
        goal = sh.Objective(bare_model(w), {loss: 1.0}, rows, memory=LEAN)
        return lambda: goal.from_hidden(h, y, teacher_hidden=states)

    return prepare


def objective(loss: str, memory: int = 2**29) -> Callable[[Tensor, Tensor, Tensor], Loss]:
    def prepare(h: Tensor, w: Tensor, y: Tensor) -> Loss:
        theirs = teacher(w) if loss == "kl" else None
        goal = sh.Objective(bare_model(w), {loss: 1.0}, theirs, memory=memory)
        return lambda: goal.from_hidden(h, y)

    return prepare


def vq(part: int) -> Callable[[Tensor, Tensor, Tensor], Loss]:
    def prepare(h: Tensor, w: Tensor, y: Tensor) -> Loss:
        head = vq_head(part)(w)
        model = bare_model(w)
        model.set_output_embeddings(head)
        goal = sh.Objective(model, {"cross_entropy": 1.0})
        return lambda: goal.from_hidden(h, y)

    return prepare


def whole_statistics(h: Tensor, w: Tensor, y: Tensor) -> Loss:
    """Log-probability and entropy, as trainers that reward entropy take them."""

    def loss() -> Tensor:
        log_p = (h @ w.T).float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return -(log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1) + 0.01 * entropy).mean()

    return loss


def statistics_of(head_of: Callable[[Tensor], nn.Module]) -> Prepare:
    def prepare(h: Tensor, w: Tensor, y: Tensor) -> Loss:
        head = head_of(w)

        def loss() -> Tensor:
            found = token_statistics(head, h, y)
            return -(found.log_prob + 0.01 * found.entropy).mean()

        return loss

    return prepare


def linear_head(w: Tensor) -> nn.Module:
    return bare_model(w).lm_head  # type: ignore[arg-type, no-any-return]


def vq_head(part: int) -> Callable[[Tensor], nn.Module]:
    def build(w: Tensor) -> nn.Module:
        codes = len(w) // part
        head = VQ(codes=codes).module(w.shape[1], len(w)).to(w.dtype)
        with torch.no_grad():
            head.weight.copy_(w[:codes])
            head.codes.copy_(torch.arange(len(w)) % codes)
        return head

    return build


METHODS: dict[str, Prepare] = {
    WHOLE: whole,
    "F.linear_cross_entropy": torch_plain,
    "F.linear_cross_entropy, chunked": torch_chunked,
    "cut_cross_entropy, torch_compile": cut,
    "Objective: cross-entropy": objective("cross_entropy"),
    "Objective: cross-entropy, lean": objective("cross_entropy", memory=LEAN),
    "whole logits: KL from a teacher": whole_kl,
    "Objective: KL from a teacher": objective("kl"),
    "whole logits: KL from a wider model": whole_from_wider(losses.KL()),
    "Objective: KL from a wider model, lean": lean_from_wider(losses.KL()),
    "whole logits: reverse KL from a wider model": whole_from_wider(losses.ReverseKL()),
    "Objective: reverse KL from a wider model, lean": lean_from_wider(losses.ReverseKL()),
    "whole logits: JSD from a wider model": whole_from_wider(losses.JSD()),
    "Objective: JSD from a wider model, lean": lean_from_wider(losses.JSD()),
    "Objective: spherical z-loss, Gram matrix": objective("spherical_z"),
    "Objective: VQ head, C = V/16": vq(16),
    "Objective: VQ head, C = V/100": vq(100),
    WHOLE_STATISTICS: whole_statistics,
    "token statistics: dense head": statistics_of(linear_head),
    "token statistics: VQ head, C = V/16": statistics_of(vq_head(16)),
    "token statistics: VQ head, C = V/100": statistics_of(vq_head(100)),
}
ONCE = {"F.linear_cross_entropy, chunked"}  # minutes on a CPU
DENSE = [
    name
    for name in METHODS
    if not any(other in name for other in ("z-loss", "VQ", "KL", "JSD", "statistics"))
]


def measure(name: str) -> dict[str, float]:
    """One method in this process: seconds of one loss and its backward, growth of the peak memory, loss."""
    torch.set_num_threads(2)
    warm = (TOKENS, VOCAB) if "compile" in name else (64, 512)
    METHODS[name](*problem(*warm, DIM))().backward()
    loss_of = METHODS[name](*problem(TOKENS, VOCAB, DIM))
    with peak_memory() as peak:
        start = time.perf_counter()
        loss = loss_of()
        loss.backward()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "mib": peak["bytes"] / 2**20, "loss": float(loss.detach())}


def gradient_error(name: str) -> float:
    """Error of the bf16 gradients of hidden states and weight to float64, relative."""
    tensors = problem(256, 4096, 256)
    h, w = (x.detach().double().requires_grad_() for x in tensors[:2])
    F.cross_entropy(h @ w.T, tensors[2]).backward()
    METHODS[name](*tensors)().backward()
    errors = [
        (a.grad.double() - b.grad).norm() / b.grad.norm()
        for a, b in zip(tensors, (h, w), strict=False)
    ]
    return float(max(errors))


def available(name: str) -> bool:
    return not name.startswith("cut") or importlib.util.find_spec("cut_cross_entropy") is not None


def child(name: str, what: str) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, what, name], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def plot(rows: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for name, row in rows.items():
        ours = name.startswith("Objective")
        point = (row["mib"], row["time"])
        axes.scatter(*point, color="#bf616a" if ours else "#4c566a", s=24)
        left = ours and "VQ" not in name  # neighbours on different sides of their points
        place = (-5 if left else 5, -9 if name.startswith("cut") else 2)
        axes.annotate(
            name,
            point,
            fontsize=7,
            xytext=place,
            textcoords="offset points",
            ha="right" if left else "left",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="extra memory at the peak, MiB",
        ylabel="time ÷ whole logits",
    )
    axes.set_title(
        f"Loss and gradients, {TOKENS:,} tokens, V = {VOCAB:,}, D = {DIM:,}, bf16", loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="measure the rows whose names contain this")
    given = parser.parse_args()
    rounds, order = given.rounds, random.Random(0)
    names = [name for name in METHODS if available(name) and (given.only in name or name == WHOLE)]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        here = [name for name in names if number == 0 or name not in ONCE]
        order.shuffle(here)
        for name in here:
            samples[name].append(child(name, "--measure"))
            print(f"{name}: {samples[name][-1]}", flush=True)
    rows: dict[str, Any] = {}
    for name in names:
        ratios = [
            s["seconds"] / w["seconds"] for s, w in zip(samples[name], samples[WHOLE], strict=False)
        ]
        rows[name] = {
            "seconds": min(s["seconds"] for s in samples[name]),
            "time": statistics.median(ratios),
            "time_low": min(ratios),
            "time_high": max(ratios),
            "mib": statistics.median(s["mib"] for s in samples[name]),
            "loss": samples[name][0]["loss"],
            "rounds": len(ratios),
        }
        if name in DENSE:
            rows[name]["gradient_error"] = child(name, "--error")
    if given.only:  # the others stay as they were measured, on the machine of their own run
        before = json.loads((RESULTS / "losses.json").read_text())
        added = {
            name: {**row, "provenance": provenance(0)}
            for name, row in rows.items()
            if name != WHOLE
        }
        before["rows"].update(added)
        write_json(RESULTS / "losses.json", before)
        return
    settings = {"tokens": TOKENS, "vocab": VOCAB, "dim": DIM, "dtype": "bfloat16", "threads": 2}
    results = {"settings": settings, "baseline": WHOLE, "rows": rows, "provenance": provenance(0)}
    write_json(RESULTS / "losses.json", results)
    plot(rows, RESULTS / "losses.png")
    table = Table(["", "time ÷ whole logits", "seconds", "extra MiB", "gradient error"])
    for name, row in rows.items():
        error = f"{row['gradient_error']:.4f}" if "gradient_error" in row else ""
        table.add(name, f"{row['time']:.3f}", f"{row['seconds']:.2f}", f"{row['mib']:.0f}", error)
    print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    elif sys.argv[1:2] == ["--error"]:
        print(json.dumps(gradient_error(sys.argv[2])))
    else:
        main()
