"""Write the tables of README and docs from the results files: `python docs/generate.py`; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_softheads.tables import Table, human_bytes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def vq_table() -> str:
    """VQ-Logits on the embedded model, from `vq.json`."""
    found = _results("vq")
    columns = ["head", "perplexity", "÷ dense", "floor", "KL", "top-1", "parameters ÷", "bytes ÷"]
    table = Table([*columns, "speed, batch 1", "batch 16"])
    dense = found["rows"][0]
    for row in found["rows"]:
        name = row["stage"] if row["divisor"] is None else f"VQ, V/{row['divisor']}, {row['stage']}"
        table.add(
            name,
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / dense['perplexity']:.2f}",
            "–" if row["floor"] is None else f"{row['floor']:.2f}",
            f"{row['kl']:.3f}",
            f"{row['top1']:.1%}",
            f"{row['dense_parameters'] / row['parameters']:.1f}",
            f"{row['dense_bytes'] / row['bytes']:.1f}",
            f"{row['speed_batch_1']['ratio']:.1f}×",
            f"{row['speed_batch_16']['ratio']:.1f}×",
        )
    size = human_bytes(dense["dense_bytes"])
    note = (
        f"The embedded model on held-out text; dense head {size} in bf16. Speed: full logits of one decoding step "
        f"against the dense bf16 `nn.Linear`. Distilled: {found['distillation_steps']} steps of the head alone."
    )
    return f"{table.markdown()}\n\n{note} {_where(found)}"


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _where(found: Any) -> str:
    origin = found["provenance"]
    machine, versions = origin["machine"], origin["versions"]
    return (
        f"([{found.get('file', 'results')}](benchmarks/results), {machine['cores']} cores {machine['cpu']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']})"
    )


BLOCKS: dict[str, tuple[Path, Callable[[], str]]] = {
    "vq": (ROOT / "README.md", vq_table),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, (file, make) in BLOCKS.items():
        text = file.read_text()
        begin, end = f"<!-- begin:{name} -->\n", f"<!-- end:{name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        fresh = f"{head}{begin}{make()}\n{end}{tail}"
        if fresh != text:
            stale.append(f"{file.relative_to(ROOT)}: {name}")
            if not check:
                file.write_text(fresh)
    if check and stale:
        print("stale, run `make docs`:", *stale, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
