"""What attention variants cost a pretrained model that is not trained for them, up to its training length.

    python benchmarks/training_free.py        # about three minutes; writes benchmarks/results/training_free.json

The embedded model (trained on windows of 512 tokens), every layer patched, all held-out text; perplexity and KL are
against the unpatched model on the same windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import hf_softheads as sh
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.files import write_json
from hf_softheads.report.provenance import provenance
from hf_softheads.text.embedded import load_embedded
from hf_softheads.text.stdlib_corpus import stdlib_documents

RESULTS = Path(__file__).parent / "results"
WINDOWS = (512, 256)


def cases(trained: int) -> list[AttentionSpec]:
    a = sh.attention
    return [
        a.LogN(length=trained),
        a.SSMax(),
        a.SSMax(bias=False),
        a.SSMax(bias=False, reference_length=trained),
        a.LearnedSink(start=-10),
        a.TopK(k=64),
        *(a.TopK(k=64, rest=rest) for rest in ("linear", "mean", "drop")),
        a.Selective(),
        a.Gated(),
        a.Mixed(),
        a.AdaptiveTemperature(),
    ]


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_embedded()
    dense, _ = load_embedded()
    text = stdlib_documents("heldout")
    rows: list[dict[str, Any]] = []
    for spec in cases(model.config.max_position_embeddings):
        torch.manual_seed(0)
        sh.patch(model, attention=spec)
        used = model.config.quantization_config.attention
        row: dict[str, Any] = {"asked": spec.to_dict(), "variant": used.to_dict()}
        for window in WINDOWS:
            found = sh.evaluate(model, text, tokenizer, reference=dense, window=window)
            assert found.reference_perplexity is not None
            row[str(window)] = {
                "tokens": found.tokens,
                "perplexity": found.perplexity,
                "dense": found.reference_perplexity,
                "ratio": found.perplexity / found.reference_perplexity,
                "kl": found.kl,
                "top1": found.top1,
            }
        sh.unpatch(model)
        rows.append(row)
        print(used, *(f"{w}: × {row[str(w)]['ratio']:.5f}" for w in WINDOWS), flush=True)
    write_json(
        RESULTS / "training_free.json",
        {"provenance": provenance(seed=0), "trained_length": 512, "rows": rows},
    )


if __name__ == "__main__":
    main()
