"""The softmax inside the attention layers of a language model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_softheads import bridge
from hf_softheads.attention.base import AttentionSpec, AttentionVariant
from hf_softheads.registry import spec_from_dict
from hf_softheads.sites.base import Fitting, Part, Row, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEFAULT = "sdpa"  # for a loaded model, which no longer knows what it had

Variants = dict[int, AttentionVariant]


class Attention(Site):
    slot = "attention"
    kind = "attention"
    order = 30
    options = ("layers",)

    def parse(self, value: Any, options: Mapping[str, Any]) -> Part:
        if isinstance(value, Mapping) and "name" not in value:
            if not value:
                raise ValueError("attention={} selects no layer; give {layer: variant}")
            value = {_index(i): spec_from_dict(self.kind, spec) for i, spec in value.items()}
        else:
            value = spec_from_dict(self.kind, value)
        layers = options.get("layers")
        if layers is None:
            return Part(value, {"layers": None})
        if isinstance(value, dict):
            raise ValueError(
                "layers= selects where one attention variant goes; it needs attention=variant"
            )
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise ValueError(f"layers is a list of layer indices, got {layers!r}")
        return Part(value, {"layers": [_index(i) for i in layers]})

    def to_json(self, part: Part) -> dict[str, Any]:
        value = part.value
        if isinstance(value, dict):
            return {
                self.slot: {str(i): spec.to_dict() for i, spec in value.items()},
                **part.options,
            }
        return {self.slot: value.to_dict(), **part.options}

    def for_pretrained(self, part: Part) -> Part:
        value = part.value
        if isinstance(value, dict):
            return Part({i: spec.for_pretrained() for i, spec in value.items()}, part.options)
        return Part(value.for_pretrained(), part.options)

    def build(self, model: PreTrainedModel, part: Part) -> Variants:
        layers = _layers(model)
        built = {}
        for i, spec in _by_layer(part, len(layers)).items():
            index, (path, module) = list(layers.items())[i]
            bridge.check_layer(path, module, spec)
            built[index] = spec.module(bridge.geometry(model, index, module))
        return built

    def prepare(self, model: PreTrainedModel, part: Part, fitting: Fitting) -> Variants:
        variants = self.build(model, part)
        layers = bridge.attention_layers(model)
        for index, variant in variants.items():
            path, module = layers[index]
            like = next(module.parameters())
            if like.device.type == "meta":
                raise ValueError(
                    f"{path} is not in memory (meta device or offloaded); patch before offloading"
                )
            variant.kernels = fitting.kernels
            variant.to(device=like.device, dtype=torch.float32)
            variant.reset_parameters()
            bridge.take_sinks(module, variant)
            variant.train(module.training)
            if fitting.kernels == "require":
                plain = [c for c in variant.engines(like) if not c.engine.COMPILED]
                fitting.demand(f"attention {variant.spec.name}", str(plain[0]) if plain else None)
        return variants

    def present(self, model: PreTrainedModel) -> str | None:
        name: str | None = model.config._attn_implementation
        return name

    def install(self, model: PreTrainedModel, new: Variants) -> None:
        """Give the chosen layers their variant and route the model's attention through it."""
        layers = bridge.attention_layers(model)
        for index, variant in new.items():
            bridge.give_variant(layers[index][1], variant)
        model.set_attn_implementation(bridge.IMPLEMENTATION)

    def restore(self, model: PreTrainedModel, old: str | None) -> None:
        for _, module in bridge.attention_layers(model).values():
            bridge.drop_variant(module)
        model.set_attn_implementation(old or _DEFAULT)

    def in_fp32(self, model: PreTrainedModel, new: Variants) -> set[str]:
        return {bridge.CHILD}

    def probe(self, model: PreTrainedModel, new: Variants) -> None:
        bridge.probe(model, new)

    def describe(self, model: PreTrainedModel, part: Part) -> tuple[Iterable[Row], list[str]]:
        rows = []
        for path, module in bridge.attention_layers(model).values():
            variant = getattr(module, bridge.CHILD, None)
            if isinstance(variant, AttentionVariant):
                rows.append(_row(path, module, variant))
        return rows, []


def _row(path: str, module: Any, variant: AttentionVariant) -> Row:
    count = sum(p.numel() for p in variant.parameters())
    size = sum(p.numel() * p.element_size() for p in variant.parameters())
    dropout = getattr(module, "attention_dropout", 0.0) if module.training else 0.0
    like = next(module.parameters())
    way = "; ".join(dict.fromkeys(map(str, variant.engines(like, dropout=float(dropout or 0)))))
    return Row(path, variant.spec.short(), f"{count:,}", size, way)


def _layers(model: PreTrainedModel) -> dict[int, tuple[str, Any]]:
    """The layers whose softmax can be replaced.

    Raises:
        ValueError: the family computes its attention itself, or the model is no language model.
    """
    reads = bridge.modalities(model)
    if "text" not in reads or (len(reads) > 1 and model.get_output_embeddings() is None):
        raise ValueError(
            f"{type(model).__name__} reads {' and '.join(reads)} and is no language model; attention can be replaced "
            "in language models and text encoders"
            + (", e.g. in its text tower alone" if "text" in reads else "")
        )
    layers = bridge.attention_layers(model)
    if not layers or not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) computes its attention itself instead of through "
            "transformers' attention interface, so its softmax cannot be replaced; its head can"
        )
    return layers


def _by_layer(part: Part, count: int) -> dict[int, AttentionSpec]:
    """`{place: variant}` for a model with `count` attention layers.

    Raises:
        ValueError: a layer outside the model, or an empty selection.
    """
    wanted = part.value
    if not isinstance(wanted, dict):
        chosen = part.options.get("layers")
        wanted = dict.fromkeys(range(count) if chosen is None else chosen, wanted)
    for layer in wanted:
        if not -count <= layer < count:
            raise ValueError(f"layer {layer} does not exist: the model has layers 0 to {count - 1}")
    if not wanted:
        raise ValueError(
            f"no layer selected; choose from 0 to {count - 1}, or leave layers out for all"
        )
    return {layer % count: spec for layer, spec in wanted.items()}


def _index(value: Any) -> int:
    try:
        return int(value) if isinstance(value, str) else operator.index(value)  # a string from JSON
    except (TypeError, ValueError):
        raise ValueError(f"a layer is an integer, got {value!r}") from None
