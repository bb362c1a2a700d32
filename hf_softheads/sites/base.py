"""What every site is: a place in a model that can be replaced, and how that is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from hf_softheads.kernels import KernelUnavailable
from hf_softheads.registry import spec_from_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_softheads.heads.stats import HeadStats

KernelMode = Literal["auto", "off", "require"]


@dataclass(frozen=True)
class Part:
    """What a plan says about one site.

    Attributes:
        value: a spec; where a site has several places, also `{index: spec}`.
        options: the site's own settings beside it, such as `layers`.
    """

    value: Any
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitting:
    """What a fit may use: calibration statistics, whether kernels are allowed or demanded, and what earlier sites have
    prepared, by slot."""

    stats: HeadStats | None = None
    kernels: KernelMode = "auto"
    prepared: Mapping[str, Any] = field(default_factory=dict)

    def demand(self, part: str, lacking: str | None) -> None:
        """Raise KernelUnavailable if kernels are demanded and `part` cannot have one, for the reason `lacking`."""
        if self.kernels == "require" and lacking is not None:
            raise KernelUnavailable(
                f'kernels="require", but the {part} cannot be computed by a kernel: {lacking}; with kernels="auto" '
                "torch computes it"
            )


class Row(NamedTuple):
    """One line of `describe`."""

    path: str
    variant: str
    parameters: str
    nbytes: int
    backend: str


class Site:
    """A place in a model that can be replaced. One file of this package defines one.

    `patch` and the loader know sites by this contract only: `prepare` (or `build`, for a checkpoint's structure on the
    meta device) makes new modules and refuses before anything has changed; `present` keeps what is there, `install`
    puts the new in, `probe` runs a trial, `restore` puts the old back.

    Attributes:
        slot: the keyword of `patch`, the key in `config.json`, the option of the command line. Sites may share one:
            the kind of the variant decides.
        kind: of its variants.
        order: sites of a lower number come first; of those that share a slot the first one answers for unknown names.
        options: keywords of its own beside the slot.
    """

    slot: ClassVar[str]
    kind: ClassVar[str]
    order: ClassVar[int]
    options: ClassVar[tuple[str, ...]] = ()

    def parse(self, value: Any, options: Mapping[str, Any]) -> Part:
        """The part that Python objects or JSON describe. Raises ValueError."""
        return Part(spec_from_dict(self.kind, value))

    def to_json(self, part: Part) -> dict[str, Any]:
        """The part as it goes into `config.json`, by slot and options."""
        return {self.slot: part.value.to_dict()}

    def for_pretrained(self, part: Part) -> Part:
        """The part with what is left open decided in favour of what starts closest to the trained model."""
        return part

    def by_default(self, model: PreTrainedModel, parts: Mapping[str, Part]) -> Part | None:
        """What this site adds to a plan of other `parts`, by slot, that says nothing about it."""
        return None

    def complete(self, model: PreTrainedModel, part: Part, parts: Mapping[str, Part]) -> Part:
        """The part for this very model, with what was left open decided. Raises ValueError if it cannot be there."""
        return part

    def is_in(self, model: PreTrainedModel) -> bool:
        """Has this model such a place? A checkpoint may be loaded as a class without it."""
        return True

    def build(self, model: PreTrainedModel, part: Part) -> Any:
        """New modules, uninitialised, under any device. Raises ValueError if the model has no such place."""
        raise NotImplementedError

    def prepare(self, model: PreTrainedModel, part: Part, fitting: Fitting) -> Any:
        """New modules fitted to the model's own; the model is not changed."""
        raise NotImplementedError

    def present(self, model: PreTrainedModel) -> Any:
        """What is there now: what `restore` needs to put it back."""
        raise NotImplementedError

    def install(self, model: PreTrainedModel, new: Any) -> None:
        """Put the modules in."""
        raise NotImplementedError

    def restore(self, model: PreTrainedModel, old: Any) -> None:
        """Put back what was `present`, also after an `install` that failed; `old` is None for a loaded checkpoint."""
        raise NotImplementedError

    def check_restore(self, old: Any) -> None:
        """Raise ValueError if `restore` needs what is no longer there."""

    def in_fp32(self, model: PreTrainedModel, new: Any) -> set[str]:
        """Names of parameters, or of modules, that stay in fp32 whatever dtype the model is loaded in."""
        return set()

    def loaded(self, model: PreTrainedModel) -> None:
        """Called when a checkpoint's weights are in."""

    def probe(self, model: PreTrainedModel, new: Any) -> None:
        """Run what was installed on a few tokens. Raises ValueError if it does not do what it says."""

    def describe(self, model: PreTrainedModel, part: Part) -> tuple[Iterable[Row], list[str]]:
        """Lines of the table, and notes."""
        raise NotImplementedError
