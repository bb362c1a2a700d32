"""Write the tables of README and docs from the results files: `python docs/generate.py`; `--check` only compares."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_softheads  # noqa: F401 - registers every variant
from hf_softheads.attention.base import AttentionSpec
from hf_softheads.registry import variants
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
        if row["stage"] == "published + distilled":
            continue  # between the two others; it is in the results file
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


def speed_table() -> str:
    """The VQ head at the size of a 1 B model's head, from `vq_speed.json`."""
    found = _results("vq_speed")
    table = Table(["one decoding step", "batch 1", "÷ dense", "batch 16", "÷ dense"])
    for name in found["batch_1"]:
        one, many = found["batch_1"][name], found["batch_16"][name]
        ratios = [f"{row['ratio']:.1f}× faster" if row["ratio"] > 1 else "–" for row in (one, many)]
        table.add(name, f"{one['ms']:.2f} ms", ratios[0], f"{many['ms']:.2f} ms", ratios[1])
    memory = found["log_prob"]["V/100"]
    share = memory["dense_logits"] / max(memory["peak_growth"], 1)
    clusters = found["kmeans"]
    return (
        f"{table.markdown()}\n\nV={found['vocab']:,}, D={found['dim']:,}, bf16, random weights, cold caches, in one "
        f"process. `log_prob` of {found['tokens']:,} tokens at C=V/100 takes "
        f"{human_bytes(memory['peak_growth'])} at its "
        f"peak, {share:.0f} times less than the dense logits. k-means for {clusters['points']:,} rows of "
        f"{clusters['dim']:,} and {clusters['codes']:,} codes: {clusters['seconds']:.0f} s. {_where(found)}"
    )


def frontier_table() -> str:
    """The best head within each budget beside the best plain baseline of the same run, from `heads.json`."""
    found = _results("heads")
    baselines = found["baselines"]
    table = Table(
        [
            "bits a weight, all in",
            "best head",
            "perplexity ÷ dense",
            "top-1",
            "best baseline",
            "÷ dense",
        ]
    )
    rows = [row for row in found["rows"] if row["variant"] != "screened"]  # it keeps the exact rows
    for budget in (1.1, 2.25, 3.25, 4.5, 8.1):
        inside = [row for row in rows if row["bits"] <= budget]
        best = min((r for r in inside if r["variant"] not in baselines), key=lambda r: r["ratio"])
        plain = min((r for r in inside if r["variant"] in baselines), key=lambda r: r["ratio"])
        table.add(
            f"≤ {budget}",
            f"{best['variant']} ({best['bits']:.2f})",
            f"{best['ratio']:.4f}",
            f"{best['top1_agreement']:.1%}",
            f"{plain['variant']} ({plain['bits']:.2f})",
            f"{plain['ratio']:.4f}",
        )
    lean = min(
        (r for r in rows if r["parameter_share"] <= 0.01),
        key=lambda r: r["ratio"] + r["bits"] / 1000,
    )
    screened = max(
        (r for r in found["rows"] if r["variant"] == "screened"), key=lambda r: r["top1_agreement"]
    )
    return (
        f"{table.markdown()}\n\nWith {1 - lean['parameter_share']:.1%} of the floating-point parameters gone, as the "
        f"VQ-Logits paper counts, `{lean['variant']}` is at {lean['ratio']:.4f} ({lean['bits']:.1f} bits of integer "
        "codes a weight: parameters are the wrong unit). `screened` agrees with the fp32 head on "
        f"{screened['top1_agreement']:.2%} of the greedy tokens, reads {screened['bits_read'] / 16:.1%} of the bf16 "
        f"head's bytes and has normalised probabilities ({screened['ratio']:.4f}). {_where(found)}"
    )


def heads_table() -> str:
    """Every head of `heads.json`."""
    found = _results("heads")
    table = Table(
        ["head", "bits stored", "bits read", "parameters", "perplexity ÷ dense", "KL", "top-1"]
    )
    for row in sorted(
        found["rows"], key=lambda row: (row["variant"], row["bits"], row["repair_steps"])
    ):
        table.add(
            row["variant"],
            f"{row['bits']:.2f}",
            f"{row['bits_read']:.2f}",
            f"{row['parameter_share']:.1%}",
            f"{row['ratio']:.4f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.1%}",
        )
    return f"{table.markdown()}\n\n{_where(found, '../')}"


def head_speed_table() -> str:
    """Decoding steps of the heads at the size of a 1 B model's head, from `head_speed.json`."""
    found = _results("head_speed")
    rate = found["bandwidth"]["batch 1"]
    one, many = (found["speed"][f"batch {batch}"] for batch in (1, 16))
    table = Table(
        ["one decoding step", "batch 1", "÷ dense", "of its byte limit", "batch 16 ÷ dense"]
    )
    for name, row in one.items():
        table.add(
            name,
            f"{row['ms']:.2f} ms",
            f"{row['ratio']:.1f}×",
            f"{row['limit']:.0%}",
            f"{many[name]['ratio']:.1f}×",
        )
    return (
        f"{table.markdown()}\n\nRatio to the dense bf16 product in the same process, {found['clock']}, "
        f"V={found['shape'][0]:,}, D={found['shape'][1]:,}, kernels: {found['kernel']}. Byte limit: reading the bytes "
        "of a step at the bandwidth of a sum over 512 MiB that takes its turn with the heads: here "
        f"{rate['median'] / 1e9:.0f} GB/s, {rate['fastest'] / 1e9:.0f} in its fastest turn. {_where(found, '../')}"
    )


def screens_table() -> str:
    """Whether screens find the right tokens at that size, from `screens.json`."""
    found = _results("screens")
    decays = found["decays"]
    columns = [
        f"{what}, decay {decay}" for decay in decays for what in ("same token", "log Z off by")
    ]
    table = Table(["screened by", "candidates", "bytes read", *columns])
    agreement = [(f"{rows['linear']['agreement']:.2%}", "–") for rows in decays.values()]
    table.add("(a bf16 `nn.Linear`)", "–", "100%", *(cell for pair in agreement for cell in pair))
    first, *_ = decays.values()
    for name, row in first["screens"].items():
        cells = []
        for rows in decays.values():
            here = rows["screens"][name]
            cells += [f"{here['agreement']:.2%}", f"{here['log_z']['absolute']:.4f}"]
        table.add(name, row["spec"]["candidates"], f"{row['bytes_read']:.1%}", *cells)
    return (
        f"{table.markdown()}\n\nV={found['shape'][0]:,}, D={found['shape'][1]:,}, synthetic rows in clusters of "
        f"clusters whose spectrum falls like `j ** -decay`; {found['judges']:,} states. {_where(found, '../')}"
    )


def losses_table() -> str:
    """Time and memory of losses over a large vocabulary, from `losses.json`."""
    found = _results("losses")
    table = Table(["loss with gradients", "time ÷ whole logits", "extra memory"])
    for name, row in found["rows"].items():
        table.add(name, f"{row['time']:.3f}", human_bytes(row["mib"] * 2**20))
    return f"{table.markdown()}\n\n{_where(found, '../')}"


def distillation_table() -> str:
    """The same head repaired with different losses, from `distillation.json`."""
    found = _results("distillation")
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
        f"{len(found['rows']) - 1} rows, so a wider search may still change places. {_where(found, '../')}"
    )


def confidence_table() -> str:
    """Area under the risk–coverage curve by label smoothing and score, from `confidence.json`."""
    found = _results("confidence")
    settings = found["settings"]
    cases = {"vocabulary": "whole vocabulary", "classes": f"{settings['classes']} classes"}
    scores = list(found["rows"]["classes"]["0.0"]["aurc"])
    table = Table(["answers", "label smoothing", "accuracy", *scores])
    for case, label in cases.items():
        for name, row in found["rows"][case].items():
            values = (f"{value:.4f}" for value in row["aurc"].values())
            table.add(label, name, f"{row['accuracy']:.1%}", *values)
    counts = " and ".join(f"{found['rows'][case]['0.0']['tokens']:,}" for case in cases)
    return (
        f"{table.markdown()}\n\nArea under the risk–coverage curve, lower is better, on {counts} held-out tokens. The "
        f"whole vocabulary: the model's own head, trained {settings['steps']} steps further. Classes: the most "
        f"frequent next tokens, a two-layer net on the states, {settings['epochs']} epochs. {_where(found, '../')}"
    )


def attention_table() -> str:
    """Every attention variant, from the docstrings and tags of its class."""
    columns = ["name", "formula", "source", "sums to one", "exact zeros", "sinks", "training-free"]
    table = Table([*columns, "parameters", "computed by"])
    for name, cls in variants("attention").items():
        formula, source = _docstring(cls)
        spec: Any = cls()
        own = cls.init_params is not AttentionSpec.init_params
        tags = (
            spec.sums_to_one,
            spec.exact_zeros,
            spec.sinks,
            spec.for_pretrained().training_free,
        )
        table.add(
            f"`{name}`",
            formula,
            source,
            *("yes" if tag else "no" for tag in tags),
            inspect.getdoc(cls.init_params).rstrip(".") if own else "–",
            "C++ kernel" if spec.row_map() else spec.path().partition(":")[0],
        )
    return table.markdown()


def fit_table() -> str:
    """What fitting each head takes at the size of a 0.6 B model's, from `fit_scale.json`."""
    found = _results("fit_scale")
    table = Table(["head", "CPU seconds", "memory ÷ dense matrix", "KL"])
    for row in found["rows"].values():
        kl = "–" if row["kl"] is None else f"{row['kl']:.4f}"
        table.add(_spec(row["spec"]), f"{row['seconds']:.0f}", f"{row['share']:.1f}", kl)
    vocab, dim = found["shape"]
    size = human_bytes(2 * vocab * dim)
    return (
        f"{table.markdown()}\n\n`sh.patch` of a V={vocab:,}, D={dim:,} head, statistics of {found['states']:,} hidden "
        "states. Processor time of one thread. Memory: growth of the peak beyond the loaded model and the statistics, "
        f"the new head included, in multiples of the dense bf16 matrix ({size}). KL from the dense head on synthetic "
        f"rows, which tells nothing of real ones. {_where(found, '../')}"
    )


def _spec(spec: dict[str, Any]) -> str:
    """A spec as one writes it, without what is None."""
    fields = [
        f"{name}={_spec(value) if isinstance(value, dict) else value}"
        for name, value in spec.items()
        if name != "name" and value is not None and value != {"name": "dense"}
    ]
    return f"{spec['name']}({', '.join(fields)})"


def head_variants_table() -> str:
    """Every head variant and every classifier, from the docstring and the fields of its class."""
    table = Table(["name", "what it computes", "source", "fields", "lossless setting"])
    for name, cls in (variants("head") | variants("classifier")).items():
        formula = inspect.getdoc(cls).splitlines()[0].replace("|", r"\|")
        found = re.search(r"(?:arXiv |Source: |\()((?:cs/)?\d{4}\.?\d{3,5})", inspect.getdoc(cls))
        fields = [f"`{f.name}`" for f in dataclasses.fields(cls)]
        starts_exact = cls.kind == "classifier"
        exact = starts_exact or cls.lossless(64, 512) is not None
        source = "–" if found is None else f"[{found[1]}](https://arxiv.org/abs/{found[1]})"
        table.add(f"`{name}`", formula, source, ", ".join(fields) or "–", "yes" if exact else "–")
    return table.markdown()


def attention_speed_table() -> str:
    """Speed and untrained quality of every attention variant, from `attention.json`."""
    found = _results("attention")
    timed: dict[str, dict[str, float]] = {}
    for row in found["speed"]:
        kind = "bf16 " if row["dtype"] == "bfloat16" else ""
        case = f"{kind}{row['length']:,} {'fwd + bwd' if row['train'] else 'fwd'}"
        timed.setdefault(row["variant"], {})[case] = row["ratio"]
    plain = {r["variant"]["name"]: r for r in reversed(found["quality"])}
    cases = list(next(iter(timed.values())))
    table = Table(["variant", *cases, "perplexity ×, untrained", "sink rate", "zeros"])
    for name, ratios in timed.items():
        row = plain.get(name)
        facts = ["–"] * 3
        if row is not None:
            ratio, sinks = row["perplexity_ratio"], row["sink_rate"]
            facts = [f"{ratio:.3f}", f"{sinks:.0f} %", f"{row['zeros']:.0%}"]
        table.add(f"`{name}`" if row else name, *(f"{ratios[c]:.2f}" for c in cases), *facts)
    return f"{table.markdown()}\n\n{found['path']}. {_where(found, '../')}"


def training_free_table() -> str:
    """What variants cost a pretrained model without training, from `training_free.json`."""
    found = _results("training_free")
    table = Table(
        ["variant, every layer", "512 tokens: perplexity ×", "KL", "256: perplexity ×", "KL"]
    )
    for row in found["rows"]:
        name, cells = row["variant"]["name"], []
        default = variants("attention")[name]().to_dict()
        changed = {k: v for k, v in row["variant"].items() if v != default[k]}
        shown = ", ".join(f"{k}={v}" for k, v in changed.items())
        if row["variant"] != row["asked"]:
            shown += " (as `patch` puts it in)"
        for window in ("512", "256"):
            cells += [f"{row[window]['ratio']:.5f}", f"{max(row[window]['kl'], 0):.5f}"]
        table.add(f"`{name}` {shown}".strip(), *cells)
    tokens = found["rows"][0]["512"]["tokens"]
    return (
        f"{table.markdown()}\n\nThe embedded model, trained on {found['trained_length']} tokens, on {tokens:,} "
        f"held-out tokens. {_where(found, '../')}"
    )


def _docstring(cls: type) -> tuple[str, str]:
    """The formula (first line) and the source of a variant, for a Markdown table."""
    lines = inspect.getdoc(cls).splitlines()
    source = next((line for line in lines if line.startswith("Source: ")), "Source: –")
    ends = r"(?<!eq)[.;:] |, the default|\.$"
    return tuple(text.replace("|", r"\|") for text in (lines[0], re.split(ends, source[8:])[0]))


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _where(found: Any, up: str = "") -> str:
    origin = found["provenance"]
    machine, versions = origin["machine"], origin["versions"]
    return (
        f"([results]({up}benchmarks/results), {machine['cores']} cores {machine['cpu']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']})"
    )


BLOCKS: dict[str, tuple[Path, Callable[[], str]]] = {
    "vq": (ROOT / "README.md", vq_table),
    "speed": (ROOT / "README.md", speed_table),
    "frontier": (ROOT / "README.md", frontier_table),
    "heads": (ROOT / "docs" / "heads.md", heads_table),
    "head variants": (ROOT / "docs" / "heads.md", head_variants_table),
    "fit": (ROOT / "docs" / "heads.md", fit_table),
    "head speed": (ROOT / "docs" / "heads.md", head_speed_table),
    "screens": (ROOT / "docs" / "heads.md", screens_table),
    "confidence": (ROOT / "docs" / "heads.md", confidence_table),
    "losses": (ROOT / "docs" / "losses.md", losses_table),
    "distillation": (ROOT / "docs" / "losses.md", distillation_table),
    "attention": (ROOT / "docs" / "variants.md", attention_table),
    "training free": (ROOT / "docs" / "variants.md", training_free_table),
    "attention speed": (ROOT / "docs" / "variants.md", attention_speed_table),
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
