"""What heads cost on a pretrained model: perplexity beside the dense head's, all bits counted, the body untouched.

    python benchmarks/real_models.py FOLDER --text BOOKS.txt --name SmolLM2-135M    # about twenty minutes

Writes results/real/NAME.json. The text is cut into three: 60 % for statistics and repair, 20 % for whoever chooses
settings (not read here), 20 % to report. Hidden states of the fp32 body; ratios and their standard errors are of the
differences token by token. `--only` measures the heads whose names hold a word again.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_softheads as sh
from hf_softheads import heads
from hf_softheads.bridge import SplitModel
from hf_softheads.files import read_json, write_json
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.stats import HeadStats
from hf_softheads.measure.sizes import stored_bits
from hf_softheads.report.provenance import provenance
from hf_softheads.training.cached_states import cache_states
from hf_softheads.training.distill_head import repair_head

RESULTS = Path(__file__).parent / "results" / "real"
WINDOW = 512
FIT, REPORT, REPAIR = 24_576, 20_480, 98_304  # tokens
PIECES = 60  # of a split that tokens are taken from, evenly spread


def candidates(vocab: int) -> dict[str, tuple[HeadSpec, dict[str, Any] | None]]:
    """Heads by name; with the settings of a repair."""
    found: dict[str, tuple[HeadSpec, dict[str, Any] | None]] = {
        "quantized, 8 bits": (heads.Quantized(8), None),
        "quantized, 4 bits, one scale a row": (heads.Quantized(4, None), None),
        "quantized, 4 bits": (heads.Quantized(4), None),
        "quantized, 4 bits, V/32 in 8": (heads.Quantized(4, frequent=vocab // 32), None),
    }
    for bits in (4.5, 3.25, 2.25):
        found[f"transform_coded, {bits} bits"] = heads.TransformCoded(bits=bits), None
    repair = {"steps": 100, "batch_size": 1024, "code_lr": 0.0}
    found["transform_coded, 2.25 bits, repaired"] = heads.TransformCoded(bits=2.25), repair
    return found


def tokens_of(text: list[str], tokenizer: Any, begin: float, end: float, count: int) -> Tensor:
    """`count` tokens of a part of the lines, from pieces that are spread evenly over it, `(N, WINDOW)`."""
    lines = text[int(len(text) * begin) : int(len(text) * end)]
    step, each = max(1, len(lines) // PIECES), -(-count // PIECES)
    pieces = [
        torch.tensor(
            tokenizer("\n".join(lines[i : i + max(60, each // 10)])).input_ids[:each],
            dtype=torch.long,
        )
        for i in range(0, len(lines), step)
    ]
    joined = torch.cat(pieces)[:count]
    return joined[: len(joined) // WINDOW * WINDOW].view(-1, WINDOW)


class Report:
    """The dense head on held-out states, and others beside it."""

    @torch.no_grad()
    def __init__(self, model: Any, rows: Tensor):
        self.reader = SplitModel(model)
        self.hidden, self.labels = cache_states(model, rows, tokens=10**9)
        self.dense = self.reader.head
        self.nll, self.best = self._of(self.dense)

    def _of(self, head: Any) -> tuple[Tensor, Tensor]:
        found = []
        for h, y in zip(self.hidden.split(256), self.labels.split(256), strict=True):
            z = self.reader.transform(head(h).float())
            found.append((F.cross_entropy(z, y, reduction="none").double(), z.argmax(-1)))
        return torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])

    @torch.no_grad()
    def __call__(self, head: Any) -> dict[str, float]:
        nll, best = self._of(head)
        more = nll - self.nll
        ratio = math.exp(float(more.mean()))
        error = float(more.std()) / math.sqrt(len(more)) * ratio
        top1 = float((best == self.best).double().mean())
        return {"ratio": ratio, "standard_error": error, "top1": top1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    whole = (lzma.open if given.text.suffix == ".xz" else open)(given.text, "rt", encoding="utf-8")
    text = whole.read()
    lines = text.split("\n")
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval()
    reader = SplitModel(model)
    weight, bias = reader.head.weight.detach(), getattr(reader.head, "bias", None)
    vocab, dim = weight.shape
    stats: HeadStats = sh.collect(model, tokens_of(lines, tokenizer, 0, 0.6, FIT), batch_size=4)
    report = Report(model, tokens_of(lines, tokenizer, 0.8, 1, REPORT))
    states = None
    path = RESULTS / f"{given.name}.json"
    known = read_json(path)["rows"] if path.is_file() else {}
    rows: dict[str, Any] = {}
    for name, (spec, repair) in candidates(vocab).items():
        if given.only not in name and name in known:
            rows[name] = known[name]
            continue
        begin = time.process_time()
        head = spec.module(dim, vocab, bias=bias is not None).eval()
        head.transform = reader.transform
        spec.fit(head, weight, bias, stats)
        row = {"bits": stored_bits(spec, dim, vocab, bias=bias is not None)}
        row["fit_cpu_seconds"] = time.process_time() - begin
        if repair is not None:
            if states is None:
                more = tokens_of(lines, tokenizer, 0, 0.6, REPAIR)
                states = cache_states(model, more, tokens=10**9)
            begin = time.process_time()
            model.set_output_embeddings(head)
            repair_head(model, weight.bfloat16(), states, **repair)
            model.set_output_embeddings(report.dense)
            row["repair_cpu_seconds"] = time.process_time() - begin
        rows[name] = row | report(head.eval())
        print(name, rows[name], flush=True)
    settings = {
        "model": given.name,
        "vocab": vocab,
        "dim": dim,
        "fit_tokens": stats.tokens,
        "report_tokens": len(report.labels),
        "dense_perplexity": math.exp(float(report.nll.mean())),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    write_json(path, {"settings": settings, "rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    main()
