"""Tables of the heads."""

from __future__ import annotations

import dataclasses
import inspect
import re

from sources import RESULTS, faster, milliseconds, results, where, written

from hf_softheads import classifiers, embeddings, heads  # noqa: F401 - register the variants
from hf_softheads.registry import variants
from hf_softheads.report.tables import Table, human_bytes


def vq_table() -> str:
    """VQ-Logits on the embedded model, from `vq.json`."""
    found = results("vq")
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
    return f"{table.markdown()}\n\n{note} {where(found)}"


def real_table() -> str:
    """Heads on pretrained models, from `results/real/`."""
    found = [results(f"real/{file.stem}") for file in sorted(RESULTS.glob("real/*.json"))]
    table = Table(["model", "head", "bits stored", "perplexity ÷ dense", "top-1", "fit", "repair"])
    for model in found:
        for name, row in model["rows"].items():
            table.add(
                model["settings"]["model"],
                name,
                f"{row['bits']:.2f}",
                f"{row['ratio']:.4f} ± {row['standard_error']:.4f}",
                f"{row['top1']:.1%}",
                f"{row['fit_cpu_seconds']:.0f} s",
                f"{row['repair_cpu_seconds']:.0f} s" if "repair_cpu_seconds" in row else "",
            )
    tokens = " and ".join(f"{model['settings']['report_tokens']:,}" for model in found)
    fitted = " and ".join(f"{model['settings']['fit_tokens']:,}" for model in found)
    return (
        f"{table.markdown()}\n\n{tokens} tokens of books that no fit and no choice has seen, statistics of {fitted} "
        f"others; seconds of processor time. {where(found[0], '../')}"
    )


def speed_table() -> str:
    """The VQ head at the size of a 1 B model's head, from `vq_speed.json`."""
    found = results("vq_speed")
    table = Table(["one decoding step", "batch 1", "÷ dense", "batch 16", "÷ dense"])
    for name in found["batch_1"]:
        one, many = found["batch_1"][name], found["batch_16"][name]
        table.add(name, milliseconds(one), faster(one), milliseconds(many), faster(many))
    memory = found["log_prob"]["V/100"]
    share = memory["dense_logits"] / max(memory["peak_growth"], 1)
    clusters = found["kmeans"]
    return (
        f"{table.markdown()}\n\nV={found['vocab']:,}, D={found['dim']:,}, bf16, random weights, cold caches, in one "
        f"process. `log_prob` of {found['tokens']:,} tokens at C=V/100 takes "
        f"{human_bytes(memory['peak_growth'])} at its "
        f"peak, {share:.0f} times less than the dense logits. k-means for {clusters['points']:,} rows of "
        f"{clusters['dim']:,} and {clusters['codes']:,} codes: {clusters['seconds']:.0f} s. {where(found)}"
    )


def fast_table() -> str:
    """Some heads of `head_speed.json`: those that keep the quality."""
    found = results("head_speed")
    greedy = "greedy token and its log-probability"
    structured = "product_vq, 1 bit, 16 codes, structured"
    names = {
        "`quantized`, 4 bits": "quantized, 4 bits, all scores",
        "`transform_coded`, 2 bits": "transform_coded, 2 bits, all scores",
        "`transform_coded`, 1 bit": "transform_coded, 1 bit, all scores",
        "`product_vq`, 2 bits": "product_vq, 2 bits, structured, all scores",
        "`product_vq`, 1 bit": f"{structured}, all scores",
        "`screened` by `product_vq`, token and log-probability": f"screened by {structured}, {greedy}",
        "`screened` by `low_rank`, the same, no compiler": (
            f"screened by low_rank D/8 in 8 bits, {greedy}, no kernels"
        ),
    }
    one, many = (found["speed"][f"batch {batch}"] for batch in (1, 16))
    table = Table(["one decoding step", "bytes read", "batch 1", "÷ dense", "batch 16", "÷ dense"])
    for name, row in names.items():
        size = one[row]["bytes_read"] / one["dense"]["bytes_read"]
        cells = [f(by[row]) for by in (one, many) for f in (milliseconds, faster)]
        table.add(name, f"{size:.1%}", *cells)
    return f"{table.markdown()}\n\n{where(found)}"


def frontier_table() -> str:
    """The best head within each budget beside the best plain baseline of the same run, from `heads.json`."""
    found = results("heads")
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
        f"head's bytes and has normalised probabilities ({screened['ratio']:.4f}). {where(found)}"
    )


def heads_table() -> str:
    """Every head of `heads.json`."""
    found = results("heads")
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
    return f"{table.markdown()}\n\n{where(found, '../')}"


def head_speed_table() -> str:
    """Decoding steps of the heads at the size of a 1 B model's head, from `head_speed.json`."""
    found = results("head_speed")
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
        f"{rate['median'] / 1e9:.0f} GB/s, {rate['fastest'] / 1e9:.0f} in its fastest turn. {where(found, '../')}"
    )


def head_states_table() -> str:
    """Heads at the sizes of two small models' heads by number of hidden states, from `head_speed.json`."""
    found = results("head_speed")["states"]
    counts = list(next(iter(next(iter(found["speed"].values())).values())))
    table = Table(["model", "dtype", "÷ dense, hidden states:", *counts])
    for model, by_dtype in found["speed"].items():
        for dtype, by_count in by_dtype.items():
            for name in by_count[counts[0]]:
                if name != "dense":
                    ratios = (by_count[count][name]["ratio"] for count in counts)
                    table.add(model, dtype, name, *(f"{ratio:.2f}×" for ratio in ratios))
    shapes = ", ".join(f"{m}: V={v:,}, D={d}" for m, (v, d) in found["shapes"].items())
    return (
        f"{table.markdown()}\n\nRatio to the dense product of the same dtype in the same process, {found['clock']}, "
        f"kernels: {found['kernel']}. {shapes}. {where(found, '../')}"
    )


def busy_table() -> str:
    """A decoding step beside a process that keeps a core busy, from `head_speed.json`."""
    found = results("head_speed")["busy"]
    table = Table(["beside a busy process", *next(iter(found["ms"].values()))])
    for name, row in found["ms"].items():
        table.add(name, *(f"{ms:.2f} ms" for ms in row.values()))
    return (
        f"{table.markdown()}\n\nMedian wall time of a step at the size of {found['model']}'s head, bf16, one state, "
        f"kernels: {found['kernel']}. {where(found, '../')}"
    )


def screens_table() -> str:
    """Whether screens find the right tokens at that size, from `screens.json`."""
    found = results("screens")
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
        f"clusters whose spectrum falls like `j ** -decay`; {found['judges']:,} states. {where(found, '../')}"
    )


def fit_table() -> str:
    """What fitting each head takes at the size of a 0.6 B model's, from `fit_scale.json`."""
    found = results("fit_scale")
    table = Table(["head", "CPU seconds", "memory ÷ dense matrix", "KL"])
    for row in found["rows"].values():
        kl = "–" if row["kl"] is None else f"{row['kl']:.4f}"
        table.add(written(row["spec"]), f"{row['seconds']:.0f}", f"{row['share']:.1f}", kl)
    vocab, dim = found["shape"]
    size = human_bytes(2 * vocab * dim)
    return (
        f"{table.markdown()}\n\n`sh.patch` of a V={vocab:,}, D={dim:,} head, statistics of {found['states']:,} hidden "
        "states. Processor time of one thread. Memory: growth of the peak beyond the loaded model and the statistics, "
        f"the new head included, in multiples of the dense bf16 matrix ({size}). KL from the dense head on synthetic "
        f"rows, which tells nothing of real ones. {where(found, '../')}"
    )


def head_variants_table() -> str:
    """Every variant of a head, a classifier or an embedding, from the docstring and the fields of its class."""
    table = Table(["name", "what it computes", "source", "fields", "lossless setting"])
    for name, cls in (variants("head") | variants("classifier") | variants("embedding")).items():
        formula = inspect.getdoc(cls).splitlines()[0].replace("|", r"\|")
        found = re.search(r"(?:arXiv |Source: |\()((?:cs/)?\d{4}\.?\d{3,5})", inspect.getdoc(cls))
        fields = [f"`{f.name}`" for f in dataclasses.fields(cls)]
        exact = cls.kind != "head" or cls.lossless(64, 512) is not None
        source = "–" if found is None else f"[{found[1]}](https://arxiv.org/abs/{found[1]})"
        table.add(f"`{name}`", formula, source, ", ".join(fields) or "–", "yes" if exact else "–")
    return table.markdown()


def confidence_table() -> str:
    """Area under the risk–coverage curve by label smoothing and score, from `confidence.json`."""
    found = results("confidence")
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
        f"frequent next tokens, a two-layer net on the states, {settings['epochs']} epochs. {where(found, '../')}"
    )
