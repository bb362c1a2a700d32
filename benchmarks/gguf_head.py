"""What a head costs in the types of a GGUF file: ggml's own rounding against rows chosen by error feedback.

    python benchmarks/gguf_head.py MODEL TEXT                   # writes benchmarks/results/gguf_head.json
    python benchmarks/gguf_head.py MODEL TEXT --stats FILE      # with statistics that `HeadStats.save` wrote

MODEL: a folder or Hub id with a llama or Gemma 3 model; TEXT: a text file, whose first part is calibrated on and whose
last part is reported. Perplexity of fp32 logits over that of the dense head, with the standard error of the paired
difference over tokens; `head`: the head alone has the type, `both`: the tied input embedding too, as in the file.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_softheads as sh
from hf_softheads.bridge import SplitModel, tied_embeddings
from hf_softheads.files import write_json
from hf_softheads.heads.fit.ggml_types import TYPES, fit_blocks
from hf_softheads.heads.fit.hessian import local_moments
from hf_softheads.heads.stats import HeadStats
from hf_softheads.report.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "gguf_head.json"
WINDOW, CALIBRATION, REPORT = 512, 20_480, 2_048


def rounded(weight: Tensor, name: str) -> Tensor:
    """As ggml rounds by itself."""
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quants.quantize(weight.float().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


@torch.no_grad()
def losses(model: Any, rows: Tensor, states: list[Tensor] | None = None) -> tuple[Tensor, list]:
    """`-log p` of every token after the first of each row, and the hidden states; `states` instead of the body's."""
    split, found, hidden = SplitModel(model), [], []
    for i, row in enumerate(rows):
        h = split.hidden(input_ids=row[None])[0, :-1] if states is None else states[i]
        hidden.append(h)
        found.append(F.cross_entropy(split.logits(h), row[1:], reduction="none").double())
    return torch.cat(found), hidden


def ratio(own: Tensor, dense: Tensor) -> dict[str, float]:
    difference = own - dense
    value = math.exp(difference.mean())
    return {"ratio": value, "se": value * float(difference.std()) / math.sqrt(len(difference))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--name", help="what the results call the model; default its folder")
    parser.add_argument("--stats", type=Path, help="statistics of other text than the reported")
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    first, last = text[: 8 * CALIBRATION], text[-8 * REPORT :]

    def windows(part: str, count: int) -> Tensor:
        return torch.tensor(tokenizer(part).input_ids)[:count].view(-1, WINDOW)

    report = windows(last, REPORT)
    if arguments.stats is None:
        stats = sh.collect(model, windows(first, CALIBRATION))
    else:
        stats = HeadStats.load(arguments.stats)
    head = model.get_output_embeddings()
    weight = head.weight.detach().clone()
    assert tied_embeddings(model), "measured on tied models"
    metrics = local_moments(stats, weight)
    dense, states = losses(model, report)
    rows: dict[str, Any] = {}
    for name in arguments.types:
        kind = TYPES[name]
        variants = {"feedback": fit_blocks(weight, kind, metrics).rows()}
        if name != "IQ4_NL":  # the gguf package does not round to it
            variants["plain"] = rounded(weight, name)
        for way, table in variants.items():
            head.weight.data.copy_(table)
            rows[f"{name}, {way}"] = {
                "bits": kind.bits,
                "head": ratio(losses(model, report, states)[0], dense),
                "both": ratio(losses(model, report)[0], dense),
            }
            print(name, way, rows[f"{name}, {way}"], flush=True)
    settings = {
        "model": arguments.name or Path(arguments.model).name,
        "calibration_tokens": stats.tokens,
        "report_tokens": len(dense),
        "perplexity": math.exp(dense.mean()),
    }
    write_json(RESULTS, {"rows": rows, "settings": settings, "provenance": provenance(0)})


if __name__ == "__main__":
    main()
