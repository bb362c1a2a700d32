"""The plan of a patched model: the only thing of this package that goes into `config.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_softheads.attention.base import AttentionSpec
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.softpool import ClassifierSpec
from hf_softheads.registry import did_you_mean, spec_from_dict, variants

if TYPE_CHECKING:
    from hf_softheads.stats import HeadStats

METHOD = "softheads"
FORMAT_VERSION = 1

AttentionPlan = AttentionSpec | dict[int, AttentionSpec]


@register_quantization_config(METHOD)
class SoftheadsConfig(QuantizationConfigMixin):
    """What to patch: a head, an attention variant, or both.

    transformers has one slot for such plans, `quantization_config`, and rebuilds a model from it; that is why this
    is a "quantization" config. Nothing need be quantized.

    Args:
        head: a head variant, `{"name": …, field: …}` or a name; for a sequence classifier `softpool`.
        attention: the same for attention; or `{layer: variant}` for different variants in different layers.
        layers: which layers get `attention`; default all. Negative indices count from the end.
        inner: the configuration of a real quantizer of the backbone, which runs first.
        stats: calibration statistics for the fit when patching while loading; never written to disk.
    """

    def __init__(
        self,
        head: HeadSpec | ClassifierSpec | Mapping[str, Any] | str | None = None,
        attention: AttentionSpec | Mapping[Any, Any] | str | None = None,
        layers: Sequence[int] | None = None,
        inner: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        stats: HeadStats | None = None,
        **unknown: Any,
    ):
        unknown.pop("quant_method", None)
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"this model was saved by a newer hf_softheads (format {format_version}, this one reads up to "
                f"{FORMAT_VERSION}); upgrade with `pip install -U hf_softheads`"
            )
        if unknown:
            valid = ("head", "attention", "layers", "inner")
            raise ValueError(
                f"SoftheadsConfig has no field {sorted(unknown)[0]!r}; {did_you_mean(min(unknown), valid)}"
            )
        self.quant_method = METHOD
        self.head: HeadSpec | ClassifierSpec | None = None if head is None else _head(head)
        self.attention = None if attention is None else _attention_plan(attention)
        self.layers = None if layers is None else [_layer_index(i) for i in layers]
        if self.layers is not None and not isinstance(self.attention, AttentionSpec):
            raise ValueError(
                "layers= selects where one attention variant goes; it needs attention=variant"
            )
        self.inner = inner
        self.format_version = format_version
        self.stats = stats

    def to_dict(self) -> dict[str, Any]:
        attention: Any = self.attention
        if isinstance(attention, dict):
            attention = {str(i): spec.to_dict() for i, spec in attention.items()}
        elif attention is not None:
            attention = attention.to_dict()
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "head": self.head and self.head.to_dict(),
            "attention": attention,
            "layers": self.layers,
            "inner": self.inner,
        }

    def get(self, key: str, default: Any = None) -> Any:
        """transformers reads the plan of a live config, given to `from_pretrained`, as if it were its dictionary."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def for_pretrained(self) -> SoftheadsConfig:
        """The plan with every attention variant as it starts in a trained model; see `AttentionSpec.for_pretrained`."""
        attention = self.attention
        if isinstance(attention, dict):
            attention = {i: spec.for_pretrained() for i, spec in attention.items()}
        elif attention is not None:
            attention = attention.for_pretrained()
        return SoftheadsConfig(self.head, attention, self.layers, self.inner, stats=self.stats)

    def attention_by_layer(self, count: int) -> dict[int, AttentionSpec]:
        """`{layer index: variant}` for a model with `count` attention layers.

        Raises:
            ValueError: a layer index outside the model, or an empty selection.
        """
        if self.attention is None:
            return {}
        if isinstance(self.attention, dict):
            wanted = dict(self.attention)
        else:
            chosen = range(count) if self.layers is None else self.layers
            wanted = dict.fromkeys(chosen, self.attention)
        for layer in wanted:
            if not -count <= layer < count:
                raise ValueError(
                    f"layer {layer} does not exist: the model has layers 0 to {count - 1}"
                )
        if not wanted:
            raise ValueError(
                f"no layer selected; choose from 0 to {count - 1}, or leave layers out for all"
            )
        return {layer % count: spec for layer, spec in wanted.items()}


def _head(data: Any) -> Any:
    name = data.get("name") if isinstance(data, Mapping) else getattr(data, "name", data)
    classifies = isinstance(name, str) and name in variants("classifier")
    return spec_from_dict("classifier" if classifies else "head", data)


def _attention_plan(attention: Any) -> AttentionPlan:
    if isinstance(attention, Mapping) and "name" not in attention:
        return {_layer_index(i): spec_from_dict("attention", spec) for i, spec in attention.items()}
    spec: AttentionSpec = spec_from_dict("attention", attention)
    return spec


def _layer_index(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"a layer is an integer, got {value!r}") from None
