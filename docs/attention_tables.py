"""Tables of the attention variants."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sources import docstring, results, where

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.attention.call import Geometry
from hf_softheads.registry import variants
from hf_softheads.report.tables import Table


def attention_table() -> str:
    """Every attention variant, from the docstrings and tags of its class."""
    columns = ["name", "formula", "source", "sums to one", "exact zeros", "sinks", "training-free"]
    table = Table([*columns, "parameters", "computed by"])
    for name, cls in variants("attention").items():
        formula, source = docstring(cls)
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
            "C++ kernel" if spec.row_map() else _engines(spec),
        )
    return table.markdown()


def _engines(spec: AttentionSpec) -> str:
    geometry = Geometry(heads=2, kv_heads=1, head_dim=16, hidden_size=32)
    choices = spec.module(geometry).engines(torch.zeros(()))
    return ", ".join(dict.fromkeys(choice.engine.TITLE for choice in choices))


def attention_speed_table() -> str:
    """Speed and untrained quality of every attention variant, from `attention.json`."""
    found = results("attention")
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
    return f"{table.markdown()}\n\n{found['path']}. {where(found, '../')}"


def linear_speed_table() -> str:
    """Speed of the variants with a recurrent state, from `linear_attention.json`."""
    found = results("linear_attention")
    cases = dict.fromkeys((row["kind"], row["length"]) for row in found["rows"])
    timed = {(row["variant"], row["kind"], row["length"]): row for row in found["rows"]}
    heads = [
        f"{length:,} {'fwd + bwd' if kind == 'training' else 'step'}" for kind, length in cases
    ]
    table = Table(["variant", *heads])
    for name in dict.fromkeys(row["variant"] for row in found["rows"]):
        rows = [timed[(name, *case)] for case in cases]
        cells = [f"{row['ratio']:.2f} ({_duration(row['ms'])})" for row in rows]
        table.add(f"`{name}`", *cells)
    shape = found["shape"]
    return (
        f"{table.markdown()}\n\nSpeed ÷ torch's fused attention; heads of {shape['head_dim']}, "
        f"{shape['features']} features, "
        f"fp32, {found['clock']}. {where(found, '../')}"
    )


def _duration(ms: float) -> str:
    return f"{ms:.0f} ms" if ms >= 1 else f"{1e3 * ms:.0f} µs"


def training_free_table() -> str:
    """What variants cost a pretrained model without training, from `training_free.json`."""
    found = results("training_free")
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
        f"held-out tokens. {where(found, '../')}"
    )
