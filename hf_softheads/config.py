"""The plan of a patched model: the only thing of this package that goes into `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_softheads import sites
from hf_softheads.registry import did_you_mean
from hf_softheads.sites.base import Part, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_softheads.heads.stats import HeadStats

METHOD = "softheads"
FORMAT_VERSION = 1


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
        others: the keywords of further sites; False leaves a place as it is where it would be filled by default.

    Raises:
        ValueError: an unknown variant, field or keyword, a value of the wrong type, a newer format.
    """

    head: Any
    attention: Any
    layers: Any

    def __init__(
        self,
        head: Any = None,
        attention: Any = None,
        layers: Sequence[int] | None = None,
        inner: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        stats: HeadStats | None = None,
        **others: Any,
    ):
        others.pop("quant_method", None)
        _check_version(format_version)
        given = {"head": head, "attention": attention, "layers": layers, **others}
        valid = (*sites.slots(), *sites.options())
        for name in given.keys() - valid:
            raise ValueError(
                f"SoftheadsConfig has no field {name!r}; {did_you_mean(name, (*valid, 'inner'))}"
            )
        self.quant_method = METHOD
        self.inner = inner
        self.format_version = format_version
        self.stats = stats
        self.parts: dict[str, Part] = {}
        self.declined = [slot for slot in sites.slots() if given.get(slot) is False]
        for slot in sites.slots():
            value = given.get(slot)
            if value is not None and slot not in self.declined:
                site = sites.site_for(slot, value)
                options = {name: given.get(name) for name in site.options}
                self.parts[slot] = site.parse(value, options)
            part = self.parts.get(slot)
            setattr(self, slot, part and part.value)
        self._set_options(given)

    @classmethod
    def from_dict(cls, config_dict: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The plan in a folder's `config.json`. Raises ValueError."""
        if not any(config_dict.get(slot) for slot in sites.slots()):
            raise ValueError(
                f"this model's plan names none of {', '.join(sites.slots())}; its config.json is damaged, save or "
                "download it again"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def _set_options(self, given: Mapping[str, Any]) -> None:
        for site in sites.SITES:
            part = self.parts.get(site.slot)
            for name in site.options:
                if part is None and given.get(name) is not None:
                    raise ValueError(
                        f"{name}= selects where one {site.slot} variant goes; it needs {site.slot}=variant"
                    )
                setattr(self, name, part and part.options.get(name))

    def by_site(self) -> Iterator[tuple[Site, Part]]:
        """Every site that the plan replaces, and by what."""
        for slot, part in self.parts.items():
            some = next(iter(part.value.values())) if isinstance(part.value, dict) else part.value
            yield sites.site_for(slot, some), part

    def to_dict(self) -> dict[str, Any]:
        plan: dict[str, Any] = {"quant_method": METHOD, "format_version": self.format_version}
        plan |= dict.fromkeys((*sites.slots(), *sites.options()))
        for site, part in self.by_site():
            plan |= site.to_json(part)
        return {**plan, "inner": self.inner}

    def get(self, key: str, default: Any = None) -> Any:
        """transformers reads the plan of a live config, given to `from_pretrained`, as if it were its dictionary."""
        return self.to_dict().get(key, default)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def for_pretrained(self) -> SoftheadsConfig:
        """The plan with every variant as it starts in a trained model; see `AttentionSpec.for_pretrained`."""
        parts = {site.slot: site.for_pretrained(part) for site, part in self.by_site()}
        return self.with_parts(parts)

    def for_model(self, model: PreTrainedModel) -> SoftheadsConfig:
        """The plan for this very model: what was left open is decided, what sites do by default is added.

        Raises:
            ValueError: a part cannot be there.
        """
        parts = dict(self.parts)
        for site, part in self.by_site():
            parts[site.slot] = site.complete(model, part, parts)
        for site in sites.SITES:
            if site.slot not in (*parts, *self.declined):
                more = site.by_default(model, parts)
                parts |= {} if more is None else {site.slot: more}
        return self.with_parts(parts)

    def with_parts(self, parts: Mapping[str, Part]) -> SoftheadsConfig:
        """The same plan with other parts."""
        declined: dict[str, Any] = dict.fromkeys(self.declined, False)
        return SoftheadsConfig(**_keywords(parts), **declined, inner=self.inner, stats=self.stats)

    def keywords(self) -> dict[str, Any]:
        """The parts as `patch` takes them."""
        return {**_keywords(self.parts), **dict.fromkeys(self.declined, False)}


def _keywords(parts: Mapping[str, Part]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for slot, part in parts.items():
        given |= {slot: part.value, **part.options}
    return given


def _check_version(version: Any) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"this model's plan has format_version {version!r}, but a format is a whole number from 1 to "
            f"{FORMAT_VERSION}; its config.json is damaged, save or download it again"
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this model was saved by a newer hf_softheads (format {version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade with `pip install -U hf_softheads`"
        )
