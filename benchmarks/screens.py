"""Do screens find the right tokens at the size of a 1 B model's head? Greedy agreement and log Z on synthetic heads.

    python benchmarks/screens.py                      # writes benchmarks/results/screens.json
    python benchmarks/screens.py --only product_vq    # measures screens with this in their name, keeps the others

V=128,256, D=2,048, bf16 rows: clusters of clusters in a space whose spectrum falls like `j ** -decay`. Hidden states
lie near the row of a next token drawn by Zipf's law, scaled so that the dense softmax has a language model's entropy,
1.9 nats. Fitted with statistics of 65,536 states (probabilities: of 4,096), judged on 2,048 others against the dense
head in fp32. The screens are those whose speed is in `head_speed.json`. No pretrained head of this size was at hand;
`heads.json` has the embedded model's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from head_speed import DIM, SCREENS, SPECS, VOCAB

from hf_softheads import heads
from hf_softheads.files import write_json
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.stats import HeadStats
from hf_softheads.report.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "screens.json"
CLUSTERS = (100, 2_000, 20_000)
MOMENTS, STATES, JUDGES = 65_536, 4_096, 2_048
ENTROPY = 1.9  # nats
DECAYS = (0.25, 0.5, 0.75)
NAMES = (  # fitted in minutes
    "low_rank D/4 in 8 bits",
    "low_rank D/8 in 8 bits",
    "low_rank D/8",
    "product_vq, 1 bit, 16 codes, structured",
)
_CHUNK = 128  # states whose scores are held at once


def rows(decay: float, seed: int) -> Tensor:
    """`(V, D)` bf16: a row is the sum of its own part and those of the clusters around it, all of one variance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, DIM, generator=generator)

    spectrum = torch.arange(1, DIM + 1).float() ** -decay
    basis = torch.linalg.qr(normal(DIM))[0] * spectrum[:, None]
    centers = normal(CLUSTERS[0])
    # each cluster lies in one of the level above, some of which are larger than others
    for count in CLUSTERS[1:]:
        size = torch.rand(len(centers), generator=generator)
        parent = torch.multinomial(size, count, replacement=True, generator=generator)
        centers = centers[parent] + normal(count)
    weight = torch.empty(VOCAB, DIM, dtype=torch.bfloat16)
    size = torch.rand(len(centers), generator=generator)
    parent = torch.multinomial(size, VOCAB, replacement=True, generator=generator)
    for start in range(0, VOCAB, 8192):
        which = parent[start : start + 8192]
        weight[start : start + len(which)] = (centers[which] + normal(len(which))) @ basis
    return weight


def hidden_states(weight: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """`(MOMENTS + JUDGES, D)` in values of bf16, and the next tokens."""
    generator = torch.Generator().manual_seed(seed)
    zipf = 1 / torch.arange(1, VOCAB + 1).float()
    shuffled = torch.randperm(VOCAB, generator=generator)  # clusters hold frequent and rare tokens
    drawn = torch.multinomial(zipf, MOMENTS + JUDGES, replacement=True, generator=generator)
    labels = shuffled[drawn]
    other = torch.randint(VOCAB, labels.shape, generator=generator)
    states = weight[labels].float() + weight[other].float()  # noise with the rows' own spectrum
    some, low, high = states[:256], 1e-4, 1e4
    scores = some @ weight.float().T
    for _ in range(40):
        scale = (low * high) ** 0.5
        p = (scores * scale).softmax(-1)
        entropy = float(torch.special.entr(p).sum(-1).mean())
        low, high = (scale, high) if entropy > ENTROPY else (low, scale)
    return (states * scale).bfloat16().float(), labels


def statistics(weight: Tensor, states: Tensor, labels: Tensor) -> HeadStats:
    """What `collect` finds."""
    dense = weight.float()
    mean_prob, curvature = torch.zeros(VOCAB), torch.zeros(VOCAB)
    weighted = torch.zeros(VOCAB, DIM)
    second = torch.zeros(DIM, DIM, dtype=torch.float64)
    for part in states.split(4096):
        second += (part.T @ part).double()
    some = states[:STATES]
    for part in tqdm(some.split(_CHUNK), desc="collect", disable=None):
        p = (part @ dense.T).softmax(-1)
        mean_prob += p.sum(0)
        weighted.addmm_(p.T, part)
        p = p.mul_(0.9).add_(0.1 / VOCAB)
        curvature += (p * (1 - p)).sum(0)
    return HeadStats(
        second_moment=second / len(states),
        mean=states.double().mean(0),
        token_counts=torch.bincount(labels, minlength=VOCAB),
        mean_prob=mean_prob / len(some),
        curvature=curvature / len(some),
        prob_weighted_mean=weighted / mean_prob.clamp_min(1e-30)[:, None],
        states=some,
        labels=labels[:STATES],
        tokens=len(states),
    )


@torch.no_grad()
def judge(spec: HeadSpec, weight: Tensor, stats: HeadStats, judges: Tensor) -> dict[str, Any]:
    began = time.process_time()
    head: Any = spec.module(DIM, VOCAB)
    spec.fit(head, weight, None, stats)
    seconds = time.process_time() - began
    head = head.bfloat16()
    head.inner.weight.data = weight
    equal, error = 0, []
    dense = weight.float()
    for part in judges.split(_CHUNK):
        exact = part @ dense.T
        equal += int((head.topk(part.bfloat16(), 1)[1][:, 0] == exact.argmax(-1)).sum())
        error.append(head.logsumexp(part.bfloat16()) - exact.logsumexp(-1))
    found = torch.cat(error)
    return {
        "spec": spec.to_dict(),
        "agreement": equal / len(judges),
        "log_z": {"mean": float(found.mean()), "absolute": float(found.abs().mean())},
        "bytes_read": head.bytes_read / (2 * VOCAB * DIM),
        "fit_seconds": seconds,
    }


@torch.no_grad()
def linear(weight: Tensor, judges: Tensor) -> dict[str, float]:
    """The dense head itself, and a bf16 `nn.Linear`."""
    dense = weight.float()
    equal, most, entropy = 0, 0.0, 0.0
    for part in judges.split(_CHUNK):
        exact = part @ dense.T
        equal += int(((part.bfloat16() @ weight.T).argmax(-1) == exact.argmax(-1)).sum())
        p = exact.softmax(-1)
        most += float(p.amax(-1).sum())
        entropy += float(torch.special.entr(p).sum())
    total = len(judges)
    return {"agreement": equal / total, "p_max": most / total, "entropy": entropy / total}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="parts of the names of screens")
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text())["decays"] if RESULTS.exists() and arguments.only else {}
    for decay in DECAYS:
        weight = rows(decay, arguments.seed)
        states, labels = hidden_states(weight, arguments.seed + 1)
        stats = statistics(weight, states[:MOMENTS], labels[:MOMENTS])
        judges = states[MOMENTS:]
        here = found.setdefault(str(decay), {"screens": {}})
        here["linear"] = linear(weight, judges)
        print(f"decay {decay}", here["linear"], flush=True)
        for name in NAMES:
            spec = heads.Screened(SPECS[name], SCREENS[name])
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            row = here["screens"][name] = judge(spec, weight, stats, judges)
            print(
                f"  {name:<40} {row['agreement']:.2%}  {row['log_z']}  {row['fit_seconds']:.0f} s",
                flush=True,
            )
            write_json(
                RESULTS,
                {
                    "shape": [VOCAB, DIM],
                    "states": MOMENTS,
                    "judges": JUDGES,
                    "decays": found,
                    "provenance": provenance(arguments.seed),
                },
            )


if __name__ == "__main__":
    main()
