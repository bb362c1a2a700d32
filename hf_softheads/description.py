"""`describe`: what a model is patched with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from hf_softheads import bridge, checkpoint
from hf_softheads.attention import flex
from hf_softheads.attention.base import AttentionVariant
from hf_softheads.heads.base import Head
from hf_softheads.patching import base_model, original_of
from hf_softheads.registry import Spec
from hf_softheads.tables import Table, human_bytes


@dataclass(frozen=True)
class Description:
    """What is patched; prints as a table."""

    table: Table
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([str(self.table), *(f"  {note}" for note in self.notes)])


def describe(model: nn.Module) -> Description:
    """Which parts are patched with what: new parameters, bytes, and which path computes them."""
    base = base_model(model)
    plan = checkpoint.plan_of(base)
    table = Table(["part", "variant", "parameters", "bytes", "computed by"])
    notes: list[str] = []
    head = bridge.active_head(base)
    if isinstance(head, Head) and plan is not None and plan.head is not None:
        dense = head.in_features * head.out_features
        share = head.n_parameters / dense
        table.add(
            bridge.find_head(base)[0],
            _short(plan.head),
            f"{head.n_parameters:,} ({share:.2%} of dense)",
            human_bytes(head.nbytes),
            head.path,
        )
        notes += head.notes()
        if head.transform is None:
            notes.append(
                "logits are changed after the head in an unknown way: no loss without logits"
            )
        if original_of(base).tied:
            notes.append("the input embedding was tied to the head and is now a copy of its own")
    classifier = bridge.active_classifier(base)
    if classifier is not None and plan is not None and plan.head is not None:
        own = [p for n, p in classifier.named_parameters() if not n.startswith("inner.")]
        table.add(
            bridge.find_classifier(base)[0],
            _short(plan.head),
            f"{sum(p.numel() for p in own):,}",
            human_bytes(sum(p.numel() * p.element_size() for p in own)),
            "torch",
        )
    layers = bridge.attention_layers(base)
    for path, module in layers.values():
        variant = getattr(module, bridge.CHILD, None)
        if isinstance(variant, AttentionVariant):
            count = sum(p.numel() for p in variant.parameters())
            size = sum(p.numel() * p.element_size() for p in variant.parameters())
            accelerated = next(module.parameters()).device.type in flex.DEVICES
            way = flex.path(variant.spec) if accelerated else variant.spec.path()
            if variant.kernels == "off":
                way = "torch (kernels switched off)"
            table.add(path, _short(variant.spec), f"{count:,}", human_bytes(size), way)
    if not table.rows:
        notes.append(
            f"{type(base).__name__} is not patched ({len(layers)} attention layers could be)"
        )
    return Description(table, notes)


def _short(spec: Spec) -> str:
    # `name(field=value, …)` with the fields that differ from their default
    set_here = [f for f in dataclasses.fields(spec) if getattr(spec, f.name) != f.default]
    return f"{spec.name}({', '.join(f'{f.name}={getattr(spec, f.name)}' for f in set_here)})"
