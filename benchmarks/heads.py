"""Quality against size for every head, fitted without training, and after distillation for those that promise most.

    python benchmarks/heads.py                     # writes benchmarks/results/heads.json and .png; continues if killed
    python benchmarks/heads.py --repair-steps 0    # the fits alone, a few minutes on two cores

On the embedded model, held-out modules of the standard library: ratio of strict perplexity to the dense head, KL and
top-1 agreement on the same hidden states. Sizes with parameters in bf16, everything included.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import plot_heads
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_softheads as sh
from hf_softheads.bridge import Reader
from hf_softheads.corpus import stdlib_documents
from hf_softheads.data import windows
from hf_softheads.heads import (
    VQ,
    LowRank,
    LowRankResidual,
    ProductVQ,
    Quantized,
    ResidualVQ,
    Screened,
    TransformCoded,
)
from hf_softheads.results import provenance, write_json

RESULTS = Path(__file__).parent / "results"


def candidates(dim: int, vocab: int) -> list[tuple[str, Any, bool]]:
    """Label, spec, whether the fit sees the statistics. The plain forms are what others offer."""
    plain: list[tuple[str, Any, bool]] = [
        *(("vq, published", VQ(vocab // part), False) for part in (100, 32, 16, 8)),
        *(
            ("product_vq, plain", ProductVQ(dim // part, rotate=False), False)
            for part in (16, 8, 4)
        ),
        *(("round to nearest", Quantized(bits), False) for bits in (2, 3, 4, 8)),
        *(("truncated SVD", LowRank(dim * part // 4), False) for part in (1, 2, 3)),
    ]
    ours: list[tuple[str, Any, bool]] = [
        *(("vq, repaired", VQ.repaired(vocab // part), True) for part in (100, 32, 16, 8)),
        *(("product_vq", ProductVQ(dim // part), True) for part in (16, 8, 4)),
        *(
            ("product_vq, 16 codes, no basis", ProductVQ(g, 16, False), True)
            for g in (dim // 2, dim)
        ),
        ("product_vq, 64 codes, no basis", ProductVQ(dim, 64, False), True),
        *(("residual_vq", ResidualVQ(4, codes), True) for codes in (64, 256, 1024)),
        *(("quantized", Quantized(bits), True) for bits in (2, 3, 4, 5, 6, 8)),
        *(("low_rank", LowRank(dim * part // 4), True) for part in (1, 2, 3)),
        *(("low_rank_residual", LowRankResidual(8, bits), True) for bits in (2, 3, 4)),
        *(
            ("transform_coded", TransformCoded(bits, rank), True)
            for bits, rank in (
                (1.1, dim * 3 // 4),
                (1.5, dim * 3 // 4),
                (2.25, None),
                (3.25, None),
                (4.5, None),
                (6.0, None),
            )
        ),
        *(
            ("screened", Screened(TransformCoded(bits), count), True)
            for bits, count in ((1.5, 256), (2.0, 128), (2.1, 64))
        ),
    ]
    return plain + ours


class Judge:
    """Perplexity ratio, KL and agreement of a head on fixed hidden states."""

    def __init__(self, weight: Tensor, hidden: Tensor, labels: Tensor):
        self.weight, self.hidden, self.labels = weight, hidden, labels
        self.dense = [F.linear(h, weight).log_softmax(-1) for h in hidden.split(1024)]

    def identity(self) -> str:
        """Differs where the matrix or the hidden states do."""
        tensors = (self.weight, self.hidden, self.labels)
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, head: Any) -> dict[str, float]:
        loss = gain = kl = agreement = 0.0
        parts = zip(self.hidden.split(1024), self.labels.split(1024), self.dense, strict=True)
        for h, y, dense in parts:
            mine = head.logits(h).log_softmax(-1)
            loss -= float(mine.gather(1, y[:, None]).sum())
            gain -= float(dense.gather(1, y[:, None]).sum())
            kl += float((dense.exp() * (dense - mine)).sum())
            agreement += float((dense.argmax(-1) == mine.argmax(-1)).sum())
        count = len(self.labels)
        return {
            "ratio": math.exp((loss - gain) / count),
            "kl": kl / count,
            "top1_agreement": agreement / count,
        }


def stored_as_bf16(head: Any) -> Any:
    """A copy whose parameters went through bf16, as in a saved bf16 model; computing stays in fp32."""
    head = copy.deepcopy(head)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name not in head.keep_in_fp32:
                parameter.copy_(parameter.bfloat16())
    return head


def sizes(head: Any, weights: int) -> dict[str, float]:
    stored = 0
    for name, tensor in head.state_dict().items():
        half = tensor.is_floating_point() and name not in head.keep_in_fp32
        stored += tensor.numel() * (2 if half else tensor.element_size())
    read = copy.deepcopy(head).bfloat16().bytes_read
    return {
        "bits": 8 * stored / weights,
        "bytes": stored,
        "bits_read": 8 * read / weights,
        "parameters": head.n_parameters,
        "parameter_share": head.n_parameters / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--states", type=int, default=16_384, help="held-out hidden states")
    parser.add_argument(
        "--tokens", type=int, default=131_072, help="of training text for the statistics"
    )
    parser.add_argument("--repair-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model, tokenizer = sh.embedded.load_embedded()
    window = model.config.max_position_embeddings
    train = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(arguments.seed)
    held_out = windows(stdlib_documents("heldout"), tokenizer, window=window)
    held_out = held_out.shuffled(arguments.seed).head(arguments.states)
    stats = sh.collect(model, train.head(arguments.tokens))
    reader = Reader(model)
    with torch.no_grad():
        parts = [
            reader.hidden(input_ids=b)[:, :-1].flatten(0, 1) for b in held_out.input_ids.split(8)
        ]
    labels = held_out.labels[:, 1:].flatten()
    weight = model.lm_head.weight.detach()
    vocab, dim = weight.shape
    judge = Judge(weight, torch.cat(parts)[labels != -100], labels[labels != -100])

    rows = resumed(judge)
    done = [(row["variant"], row["spec"], row["repair_steps"]) for row in rows]

    def record(label: str, spec: Any, head: Any, seconds: float, steps: int) -> None:
        row = {
            "variant": label,
            "spec": spec.to_dict(),
            "repair_steps": steps,
            "fit_seconds": round(seconds, 2),
            **sizes(head, weight.numel()),
            **judge(stored_as_bf16(head)),
        }
        rows.append(row)
        print(
            f"{label:<32} {row['bits']:6.3f} bits  ratio {row['ratio']:.4f}  KL {row['kl']:.5f}  "
            f"top-1 {row['top1_agreement']:.4f}  reads {row['bits_read']:.3f}  {steps} steps",
            flush=True,
        )
        save(rows, arguments.seed, judge)

    for label, spec, informed in candidates(dim, vocab):
        if (label, spec.to_dict(), 0) in done:
            continue
        spec.check(dim, vocab)
        head = spec.module(dim, vocab)
        began = time.perf_counter()
        spec.fit(head, weight, None, stats if informed else None)
        record(label, spec, head, time.perf_counter() - began, 0)
    if arguments.repair_steps:
        for spec, lr in (  # small scales want small steps
            (TransformCoded(2.25), 2e-4),
            (TransformCoded(1.1, dim * 3 // 4), 2e-4),
            (ProductVQ(dim // 8), 1e-3),
        ):
            patched = sh.patch(copy.deepcopy(model), head=spec, stats=stats)
            began = time.perf_counter()
            sh.repair_head(
                patched,
                sh.dense_head(patched),
                train.input_ids,
                steps=arguments.repair_steps,
                lr=lr,
                seed=arguments.seed,
            )
            label = f"{spec.name} + distilled"
            seconds = time.perf_counter() - began
            record(label, spec, patched.get_output_embeddings(), seconds, arguments.repair_steps)
    plot_heads.main()


def resumed(judge: Judge) -> list[dict[str, Any]]:
    """What an interrupted run on the same matrix and the same hidden states has measured."""
    path = RESULTS / "heads.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    rows: list[dict[str, Any]] = (
        found["rows"] if found.get("judge", judge.identity()) == judge.identity() else []
    )
    return rows


def save(rows: list[dict[str, Any]], seed: int, judge: Judge) -> None:
    write_json(
        RESULTS / "heads.json",
        {
            "model": "embedded",
            "data": "held-out modules of the standard library",
            "states": len(judge.labels),
            "dense_shape": list(judge.weight.shape),
            "judge": judge.identity(),
            "rows": rows,
            "provenance": provenance(seed),
        },
    )


if __name__ == "__main__":
    main()
