"""Time and memory of fitting a head to the matrix of a 0.6 B model: V=151,936, D=1,024, bf16.

    python benchmarks/fit_scale.py                          # writes benchmarks/results/fit_scale.json
    python benchmarks/fit_scale.py --only product_vq vq     # measures these again, keeps the others

Clustered synthetic rows and statistics. Each fit in a process of its own; CPU seconds of one thread, so that other work
on the machine hardly counts (two cores need less); memory is the growth of the resident size at its peak while
`patch`'s steps run: the copy in fp32, the module, the fit. The bf16 matrix and the statistics are there before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from timing import peak_memory

from hf_softheads import heads
from hf_softheads.heads.base import HeadSpec
from hf_softheads.results import provenance, write_json
from hf_softheads.stats import HeadStats

RESULTS = Path(__file__).parent / "results" / "fit_scale.json"
VOCAB, DIM, STATES, CLUSTERS = 151_936, 1_024, 4_096, 2_000
SPECS: dict[str, HeadSpec] = {
    "quantized": heads.Quantized(4),
    "product_vq": heads.ProductVQ(groups=256),
    "vq": heads.VQ(codes=VOCAB // 16),
    "transform_coded": heads.TransformCoded(bits=2.0),
    "residual_vq": heads.ResidualVQ(4, 1024),
    "low_rank_residual": heads.LowRankResidual(64, 4),
    "screened": heads.Screened(heads.TransformCoded(bits=1.5), 256),
}


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


def statistics(weight: torch.Tensor, seed: int) -> HeadStats:
    """What `collect` would find, roughly: states around likely tokens' rows, Zipf's law."""
    generator = torch.Generator().manual_seed(seed + 1)
    zipf = 1 / torch.arange(1, VOCAB + 1).float()
    labels = torch.multinomial(zipf, STATES, replacement=True, generator=generator)
    states = weight[labels].float() * 8 + torch.randn(STATES, DIM, generator=generator)
    prob = zipf / zipf.sum()
    return HeadStats(
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


def measure(name: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    weight = rows(seed)
    stats = statistics(weight, seed)
    spec = SPECS[name]
    began = time.process_time()
    with peak_memory() as grown:
        spec.check(DIM, VOCAB)
        head = spec.module(DIM, VOCAB)
        spec.fit(head, weight.float(), None, stats)
    seconds = time.process_time() - began
    hidden = stats.states[:64]
    with torch.no_grad():
        dense = (hidden @ weight.float().T).log_softmax(-1)
        found = head(hidden).float().log_softmax(-1)
    return {
        "spec": spec.to_dict(),
        "seconds": seconds,
        "bytes": grown["bytes"],
        "share": grown["bytes"] / (weight.numel() * 2),
        "kl": float((dense.exp() * (dense - found)).sum(-1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.seed)))
        return
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for name in arguments.only:
        command = [sys.executable, __file__, "--child", name, "--seed", str(arguments.seed)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = found["rows"][name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<20} {row['seconds']:6.0f} s  {row['share']:.1f} x the matrix", flush=True)
        ordered = {name: found["rows"][name] for name in SPECS if name in found["rows"]}
        write_json(
            RESULTS,
            {"shape": [VOCAB, DIM], "rows": ordered, "provenance": provenance(arguments.seed)},
        )


if __name__ == "__main__":
    main()
