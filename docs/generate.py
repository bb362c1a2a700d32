"""Write the tables of README and docs from the results files, and the type stubs: `python docs/generate.py`; `--check`
only compares."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import attention_tables as attention
import clients
import head_tables as heads
from sources import ROOT, results, where
from stubs import stub_files

from hf_softheads.report.tables import Table, human_bytes


def losses_table() -> str:
    """Time and memory of losses over a large vocabulary, from `losses.json`."""
    found = results("losses")
    table = Table(["loss with gradients", "time ÷ whole logits", "extra memory"])
    for name, row in found["rows"].items():
        table.add(name, f"{row['time']:.3f}", human_bytes(row["mib"] * 2**20))
    later = [row["provenance"]["machine"] for row in found["rows"].values() if "provenance" in row]
    machines = sorted({f"{m['cores']} cores {m['cpu']}" for m in later})
    others = f"; the last {len(later)} rows: {', '.join(machines)}" if later else ""
    return f"{table.markdown()}\n\n{where(found, '../')}{others}"


def distillation_table() -> str:
    """The same head repaired with different losses, from `distillation.json`."""
    found = results("distillation")
    table = Table(["loss", "perplexity", "KL", "top-1", "learning rate"])
    for name, row in found["rows"].items():
        quality = f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}"
        table.add(name, *quality, f"{row['lr']:g}" if "lr" in row else "")
    settings = found["settings"]
    rates = settings["rates"]
    edge = sum(row.get("lr") in (min(rates), max(rates)) for row in found["rows"].values())
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return (
        f"{table.markdown()}\n\n{settings['codes']} codes, {settings['steps']} steps of {settings['tokens_a_step']:,} "
        f"tokens; rates tried for {settings['trial_steps']} steps: {tried}. The best one is an outermost in {edge} of "
        f"{len(found['rows']) - 1} rows, so a wider search may still change places. {where(found, '../')}"
    )


BLOCKS: dict[str, tuple[Path, Callable[[], str]]] = {
    "vq": (ROOT / "README.md", heads.vq_table),
    "fast": (ROOT / "README.md", heads.fast_table),
    "speed": (ROOT / "README.md", heads.speed_table),
    "frontier": (ROOT / "README.md", heads.frontier_table),
    "real": (ROOT / "docs" / "heads.md", heads.real_table),
    "heads": (ROOT / "docs" / "heads.md", heads.heads_table),
    "head variants": (ROOT / "docs" / "heads.md", heads.head_variants_table),
    "fit": (ROOT / "docs" / "heads.md", heads.fit_table),
    "head speed": (ROOT / "docs" / "heads.md", heads.head_speed_table),
    "head states": (ROOT / "docs" / "heads.md", heads.head_states_table),
    "busy": (ROOT / "docs" / "heads.md", heads.busy_table),
    "screens": (ROOT / "docs" / "heads.md", heads.screens_table),
    "confidence": (ROOT / "docs" / "heads.md", heads.confidence_table),
    "losses": (ROOT / "docs" / "losses.md", losses_table),
    "distillation": (ROOT / "docs" / "losses.md", distillation_table),
    "clients": (ROOT / "docs" / "clients.md", clients.clients_table),
    "attention": (ROOT / "docs" / "variants.md", attention.attention_table),
    "training free": (ROOT / "docs" / "variants.md", attention.training_free_table),
    "linear speed": (ROOT / "docs" / "variants.md", attention.linear_speed_table),
    "attention speed": (ROOT / "docs" / "variants.md", attention.attention_speed_table),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
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
    for file, fresh in stub_files().items():
        if not file.exists() or file.read_text() != fresh:
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(fresh)
    if check and stale:
        print("stale, run `make docs`:", *stale, sep="\n  ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
