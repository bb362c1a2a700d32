"""Time and memory of `sh.patch(model, head=…, stats=…)` at the size of a 0.6 B model: V=151,936, D=1,024, bf16.

    python benchmarks/fit_scale.py                          # writes benchmarks/results/fit_scale.json
    python benchmarks/fit_scale.py --only product_vq vq     # measures these again, keeps the others

A model of one layer whose head has clustered synthetic rows, and statistics of as many hidden states as `collect`
keeps; each variant in a process of its own. Seconds are processor time of one thread, so that other work on the machine
hardly counts and two cores need less. Memory is what `patch` needs beyond what was there before: the growth of the
resident size at its peak, the finished head included, as a multiple of the dense matrix in bf16. The model (with its
dense head, which `unpatch` puts back) and the statistics, the user's own input, were there before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_softheads as sh
from hf_softheads import heads
from hf_softheads.files import write_json
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.stats import HeadStats
from hf_softheads.losses.base import kl_divergence
from hf_softheads.measure.memory import peak_memory
from hf_softheads.registry import variants
from hf_softheads.report.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "fit_scale.json"
VOCAB, DIM, STATES, CLUSTERS = 151_936, 1_024, 16_384, 2_000
JUDGES = 128  # more hidden states, on which the result is compared with the dense head
SPECS: dict[str, HeadSpec] = {
    "adaptive": heads.Adaptive((VOCAB // 16, VOCAB // 4)),
    "cascade": heads.Cascade(heads.TransformCoded(bits=1.5), 256),
    "context_screen": heads.ContextScreen(64),
    "cosine": heads.Cosine(),
    "draft": heads.Draft(32_768),
    "fourier": heads.Fourier(start=VOCAB - 256),  # the last tokens are bins of a number
    "hierarchical": heads.Hierarchical(390),
    "low_rank": heads.LowRank(DIM // 4),
    "low_rank_residual": heads.LowRankResidual(64, 4),
    "product_vq": heads.ProductVQ(groups=256),
    "quantized": heads.Quantized(4, None),
    "residual_vq": heads.ResidualVQ(4, 1024),
    "screened": heads.Screened(heads.TransformCoded(bits=1.5), 256),
    "sdm": heads.SDM(),
    "svm": heads.SVM(),
    "transform_coded": heads.TransformCoded(bits=2.0),
    "vq": heads.VQ.repaired(VOCAB // 16),
}
"""For variants that are not here the middle of their ladder."""


def spec_of(name: str) -> HeadSpec:
    ladder = variants("head")[name].ladder(DIM, VOCAB)
    found: HeadSpec = SPECS.get(name) or ladder[len(ladder) // 2]
    return found


def rows(seed: int) -> torch.Tensor:
    """Rows around cluster centers, in a space with a decaying spectrum, bf16."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.linspace(2, 0.2, DIM) * DIM**-0.5
    centers = torch.randn(CLUSTERS, DIM, generator=generator)
    weight = torch.empty(VOCAB, DIM, dtype=torch.bfloat16)
    for start in range(0, VOCAB, 8192):
        part = weight[start : start + 8192]
        own = centers[torch.randint(CLUSTERS, (len(part),), generator=generator)]
        noise = torch.randn(part.shape, generator=generator)
        part.copy_((own + 0.7 * noise) * spectrum)
    return weight


def model_of(weight: torch.Tensor) -> LlamaForCausalLM:
    """A model with this head; its one layer is not run."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.lm_head.weight = torch.nn.Parameter(weight)
    return model


def statistics(weight: torch.Tensor, seed: int) -> tuple[HeadStats, torch.Tensor]:
    """What `collect` would find, roughly: states around likely tokens' rows, Zipf's law; and states to judge by."""
    generator = torch.Generator().manual_seed(seed + 1)
    zipf = 1 / torch.arange(1, VOCAB + 1).float()
    labels = torch.multinomial(zipf, STATES + JUDGES, replacement=True, generator=generator)
    states = weight[labels].float() * 8
    states += torch.randn(states.shape, generator=generator)
    states, judges = states[:STATES].clone(), states[STATES:].clone()
    labels = labels[:STATES]
    prob = zipf / zipf.sum()
    stats = HeadStats(
        second_moment=states.double().T @ states.double() / STATES,
        mean=states.double().mean(0),
        token_counts=torch.bincount(labels, minlength=VOCAB),
        mean_prob=prob,
        curvature=prob * (1 - prob) + 1e-7,
        prob_weighted_mean=weight.float().mul_(8),
        states=states,
        labels=labels,
        tokens=STATES,
    )
    return stats, judges


def measure(name: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    weight = rows(seed)
    stats, judges = statistics(weight, seed)
    model = model_of(weight)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide growth
    began = time.process_time()
    with peak_memory() as grown:
        sh.patch(model, head=spec_of(name), stats=stats)
    seconds = time.process_time() - began
    head = model.lm_head.float()  # parameters as stored, products in fp32
    with torch.no_grad():
        dense = (judges @ weight.float().T).log_softmax(-1)
        found = torch.cat([head(h).float().log_softmax(-1) for h in judges.split(16)])
    kl = float(kl_divergence(dense, found).mean())
    return {
        "spec": spec_of(name).to_dict(),
        "seconds": seconds,
        "bytes": grown["bytes"],
        "share": grown["bytes"] / (weight.numel() * 2),
        "kl": kl if math.isfinite(kl) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = list(variants("head"))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    source = provenance(arguments.seed)  # before anything is written
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.seed)))
        return
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for name in arguments.only:
        command = [sys.executable, __file__, "--child", name, "--seed", str(arguments.seed)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = found["rows"][name] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:<20} {row['seconds']:6.0f} s  {row['share']:.2f} x the matrix  KL {row['kl']}",
            flush=True,
        )
        row["commit"] = source["commit"]
        ordered = {name: found["rows"][name] for name in names if name in found["rows"]}
        content = {"shape": [VOCAB, DIM], "states": STATES, "rows": ordered, "provenance": source}
        write_json(RESULTS, content)


if __name__ == "__main__":
    main()
