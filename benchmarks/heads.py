"""Quality against size for every head, fitted without training; `repairs.py` adds rows after distillation.

    python benchmarks/heads.py                # writes benchmarks/results/heads.json and .png; continues if killed
    python benchmarks/heads.py --split dev    # prints the same on other text, to choose settings; writes nothing

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plot_heads
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_softheads as sh
from hf_softheads.bridge import SplitModel
from hf_softheads.files import write_json
from hf_softheads.heads import (
    VQ,
    Cascade,
    ContextScreen,
    FrequencyTier,
    Lattice,
    LowRank,
    LowRankResidual,
    ProductVQ,
    Quantized,
    ResidualVQ,
    Screened,
    TransformCoded,
)
from hf_softheads.losses.base import kl_divergence
from hf_softheads.measure.sizes import stored_bytes
from hf_softheads.report.provenance import provenance
from hf_softheads.text.stdlib_corpus import stdlib_documents
from hf_softheads.text.windows import windows

RESULTS = Path(__file__).parent / "results"
STATES = 16_384  # held-out hidden states
TOKENS = 131_072  # of training text for the statistics
BASELINES = ("vq, published", "product_vq, plain", "round to nearest", "truncated SVD")


def candidates(dim: int, vocab: int) -> list[tuple[str, Any, bool]]:
    """Label, spec, whether the fit sees the statistics. The plain forms are what others offer."""
    plain: list[tuple[str, Any, bool]] = [
        *(("vq, published", VQ(vocab // part), False) for part in (100, 32, 16, 8)),
        *(
            ("product_vq, plain", ProductVQ(dim // part, rotation="none"), False)
            for part in (16, 8, 4)
        ),
        *(("round to nearest", Quantized(bits), False) for bits in (2, 3, 4, 8)),
        *(("truncated SVD", LowRank(dim * part // 4), False) for part in (1, 2, 3)),
    ]
    ours: list[tuple[str, Any, bool]] = [
        *(("vq, repaired", VQ.repaired(vocab // part), True) for part in (100, 32, 16, 8)),
        *(("product_vq", ProductVQ(dim // part), True) for part in (16, 8, 4)),
        *(
            ("product_vq, structured", ProductVQ(dim // part, rotation="structured"), True)
            for part in (16, 8, 4)
        ),
        *(
            ("product_vq, structured, 16 codes", ProductVQ(g, 16, "structured"), True)
            for g in (dim // 4, dim // 2, dim)
        ),
        *(
            ("product_vq, 16 codes, no basis", ProductVQ(g, 16, "none"), True)
            for g in (dim // 2, dim)
        ),
        ("product_vq, 64 codes, no basis", ProductVQ(dim, 64, "none"), True),
        *(("residual_vq", ResidualVQ(4, codes), True) for codes in (64, 256, 1024)),
        *(("quantized", Quantized(bits, None), True) for bits in (2, 3, 4, 5, 6, 8)),
        *(
            ("quantized, frequent in 8 bits", Quantized(bits, None, frequent=vocab // 16), True)
            for bits in (2, 3, 4)
        ),
        *(("lattice", Lattice(stages), True) for stages in (1, 2)),
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
        ("cascade, margin 1", Cascade(TransformCoded(1.5), 256), True),
        ("screened by low_rank", Screened(LowRank(dim // 2, Quantized(3)), 256), True),
        ("screened by product_vq", Screened(ProductVQ(dim // 2, 16, "structured"), 64), True),
        ("screened by contexts", Screened(ContextScreen(64, vocab // 8), vocab // 8), True),
        ("frequency_tier", FrequencyTier(vocab // 8), True),
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
    def __call__(self, head: Any, hidden: Tensor | None = None) -> dict[str, float]:
        """`hidden`: what another body made of the same text."""
        loss = gain = kl = agreement = 0.0
        hidden = self.hidden if hidden is None else hidden
        parts = zip(hidden.split(1024), self.labels.split(1024), self.dense, strict=True)
        for h, y, dense in parts:
            mine = head.logits(h).log_softmax(-1)
            loss -= float(mine.gather(1, y[:, None]).sum())
            gain -= float(dense.gather(1, y[:, None]).sum())
            kl += float(kl_divergence(dense, mine).sum())
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
    stored = stored_bytes(head)
    read = copy.deepcopy(head).bfloat16().bytes_read
    return {
        "bits": 8 * stored / weights,
        "bytes": stored,
        "bits_read": 8 * read / weights,
        "parameters": head.n_parameters,
        "parameter_share": head.n_parameters / weights,
    }


@dataclass
class Bench:
    """The embedded model, its text, its statistics, and the rows found so far."""

    model: Any
    train: Any
    held_out: Any
    stats: Any
    judge: Judge
    split: str
    source: dict[str, Any]  # of this run, before it wrote anything

    @classmethod
    def prepare(cls, split: str = "heldout", seed: int = 0) -> Bench:
        source = provenance(seed)
        torch.manual_seed(seed)
        model, tokenizer = sh.embedded.load_embedded()
        window = model.config.max_position_embeddings
        train = windows(stdlib_documents("train"), tokenizer, window=window).shuffled(seed)
        held_out = windows(stdlib_documents(split), tokenizer, window=window)
        held_out = held_out.shuffled(seed).head(STATES)
        stats = sh.collect(model, train.head(TOKENS))
        labels = held_out.labels[:, 1:].flatten()
        judge = Judge(
            model.lm_head.weight.detach(), states_of(model, held_out), labels[labels != -100]
        )
        return cls(model, train, held_out, stats, judge, split, source)

    def found(self) -> list[dict[str, Any]]:
        """What an earlier run on the same matrix and the same hidden states has measured."""
        path = RESULTS / "heads.json"
        if self.split != "heldout" or not path.exists():
            return []
        content = json.loads(path.read_text())
        rows: list[dict[str, Any]] = content["rows"]
        return rows if content["judge"] == self.judge.identity() else []

    def has(self, label: str, spec: Any, steps: int) -> bool:
        return any(_key(row) == (label, spec.to_dict(), steps) for row in self.found())

    def record(
        self,
        label: str,
        spec: Any,
        head: Any,
        seconds: float,
        steps: int = 0,
        *,
        hidden: Tensor | None = None,
    ) -> None:
        """Judge a head and write its row; `seconds` are processor time."""
        row = {
            "variant": label,
            "spec": spec.to_dict(),
            "repair_steps": steps,
            "cpu_seconds": round(seconds, 1),
            **sizes(head, self.judge.weight.numel()),
            **self.judge(stored_as_bf16(head), hidden),
            "states": len(self.judge.labels),
            "commit": self.source["commit"],
        }
        print(
            f"{self.split:<8}{label:<32} {row['bits']:6.3f} bits  ratio {row['ratio']:.4f}  KL {row['kl']:.5f}  "
            f"top-1 {row['top1_agreement']:.4f}  reads {row['bits_read']:.3f}  {steps} steps {seconds:.0f} s",
            flush=True,
        )
        if self.split != "heldout":
            return
        rows = [old for old in self.found() if _key(old) != _key(row)] + [row]
        content = {
            "model": "embedded",
            "data": "held-out modules of the standard library",
            "states": len(self.judge.labels),
            "dense_shape": list(self.judge.weight.shape),
            "judge": self.judge.identity(),
            "baselines": BASELINES,
            "rows": rows,
            "provenance": self.source,
        }
        write_json(RESULTS / "heads.json", content)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["spec"], row["repair_steps"]


@torch.no_grad()
def states_of(model: Any, rows: Any) -> Tensor:
    """The hidden states `(N, D)` from which the labels of some windows are predicted."""
    reader = SplitModel(model)
    parts = [reader.hidden(input_ids=b)[:, :-1].flatten(0, 1) for b in rows.input_ids.split(8)]
    return torch.cat(parts)[rows.labels[:, 1:].flatten() != -100]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--split", choices=["heldout", "dev"], default="heldout")
    parser.add_argument("--only", nargs="*", default=[""], help="labels that begin so")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bench = Bench.prepare(arguments.split, arguments.seed)
    vocab, dim = bench.judge.weight.shape
    for label, spec, informed in candidates(dim, vocab):
        if not label.startswith(tuple(arguments.only)) or bench.has(label, spec, 0):
            continue
        spec.check(dim, vocab)
        head = spec.module(dim, vocab)
        began = time.process_time()
        spec.fit(head, bench.judge.weight, None, bench.stats if informed else None)
        bench.record(label, spec, head, time.process_time() - began)
    plot_heads.main()


if __name__ == "__main__":
    main()
