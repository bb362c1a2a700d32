"""Draw perplexity against stored bytes, bytes read and time: `python benchmarks/plot_heads.py`.

Quality and sizes are those of the embedded model (`heads.json`), times those of the same settings at the size of a 1 B
model's head (`head_speed.json`): where ranks and groups are the same share of D.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from head_speed import DIM, SPECS

from hf_softheads.report.plots import plot_frontiers

RESULTS = Path(__file__).parent / "results"
_WORST = 3.0  # perplexity ratio still drawn


def setting(spec: dict[str, Any], dim: int) -> str:
    """What two heads of different sizes must share to be the same setting."""
    values = dict(spec)
    if values["name"] == "transform_coded":
        values = {"name": values["name"], "bits": round(values["bits"])}
    for field in ("rank", "groups"):
        if values.get(field):
            values[field] = values[field] / dim
    values.pop("seed", None)
    return json.dumps(values, sort_keys=True)


def main() -> None:
    found = json.loads((RESULTS / "heads.json").read_text())
    speed = json.loads((RESULTS / "head_speed.json").read_text())["speed"]["batch 1"]
    rows = [
        {**row, "baseline": row["variant"] in found["baselines"]}
        for row in found["rows"]
        if row["ratio"] < _WORST
    ]
    dim = found["dense_shape"][1]
    plain = [row for row in rows if row["spec"]["name"] == row["variant"].partition(",")[0]]
    by_setting = {setting(row["spec"], dim): row for row in plain}
    timed = [{"variant": "dense", "ratio": 1.0, "ms": speed["dense"]["ms"]}]
    for name, spec in SPECS.items():
        if spec.name == "residual_vq":  # so many codes are another share of another vocabulary
            continue
        row = by_setting.get(setting(spec.to_dict(), DIM))
        if row is not None and f"{name}, all scores" in speed:
            timed.append({**row, "variant": spec.name, "ms": speed[f"{name}, all scores"]["ms"]})
    plot_frontiers(
        [
            (rows, "bits", "stored bits per weight, all in"),
            (rows, "bits_read", "bits read per weight and step"),
            (timed, "ms", "ms a step at V=128,256, D=2,048"),
        ],
        RESULTS / "heads.png",
        title="Heads fitted to the embedded model: perplexity against size, bytes read and time",
    )


if __name__ == "__main__":
    main()
