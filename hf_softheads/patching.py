"""The only file that changes a model: `patch` and `unpatch`. It knows no site by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from hf_softheads import bridge, sites
from hf_softheads.config import SoftheadsConfig
from hf_softheads.plan import dense_head as dense_head
from hf_softheads.plan import mark, plan_of, remember_taken_out, taken_out, unmark
from hf_softheads.registry import Spec, did_you_mean
from hf_softheads.sites.base import Fitting, KernelMode, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_softheads.heads.stats import HeadStats

M = TypeVar("M", bound=nn.Module)

_SETTINGS = "_softheads_settings"
_OWN = "_softheads_"  # begins the names of the attributes that this package keeps on a model
_MISSING = object()


def patch(
    model: M,
    head: Spec | Mapping[str, Any] | str | None = None,
    attention: Spec | Mapping[Any, Any] | str | None = None,
    layers: Sequence[int] | None = None,
    *,
    stats: HeadStats | None = None,
    kernels: KernelMode = "auto",
    saving: bool = True,
    **others: Any,
) -> M:
    """Replace the LM head, the attention softmax, or both, in place; the new parts start from the trained weights.

    The model stays an instance of its own architecture: `generate`, `Trainer`, PEFT and `save_pretrained` work as
    before, and the saved folder loads with `AutoModelForCausalLM.from_pretrained` after `import hf_softheads`.

    Args:
        model: a transformers model (or a PEFT model around one), with its weights loaded.
        head: a head variant such as `heads.VQ(codes=4096)`; for a sequence classifier `classifiers.SoftPool()`.
        attention: an attention variant such as `attention.SSMax()`, or `{layer: variant}`. In a model that reads images
            too only the language model has layers here; its towers stay as they are.
        layers: the layers that get `attention`; default all.
        stats: what `collect` found, for fits that use it.
        kernels: "auto" computes with C++ kernels where they apply, "off" never does, "require" refuses to patch where
            one is missing. It holds for this process: nothing of it is saved. `describe` says what runs.
        saving: whether the patched model may be saved later. True refuses a body whose quantizer transformers cannot
            save; False allows it.
        others: variants for further sites, by their slot. `tie`: True lets the input embedding read its rows from the
            new head (an `embeddings` variant says how), False gives it a matrix of its own; by default a model whose
            embedding shared its head's matrix is tied again, where the head has a row for each token.

    Returns:
        The same model.

    Raises:
        ValueError: anything that cannot be done, with the reason, before anything has changed.
        TypeError: `model` is not a transformers model.
        KernelUnavailable: `kernels` is "require", but a part has no kernel, or it cannot be built here.
    """
    if kernels not in (modes := ("auto", "off", "require")):
        raise ValueError(f"patch has no kernels={kernels!r}; {did_you_mean(str(kernels), modes)}")
    base = bridge.transformers_model(model)
    for name in others.keys() - {*sites.slots(), *sites.options()}:
        valid = (*sites.slots(), *sites.options(), "stats", "kernels", "saving")
        raise ValueError(f"patch has no argument {name!r}; {did_you_mean(name, valid)}")
    plan = SoftheadsConfig(head, attention, layers, stats=stats, **others).for_pretrained()
    if not plan.parts:
        raise ValueError("nothing to do: give head=…, attention=…, or both")
    present = plan_of(base)
    for slot in plan.parts.keys() & (present.parts if present else {}).keys():
        raise ValueError(
            f"this model's {slot} is already patched with {getattr(present, slot)}; call hf_softheads.unpatch(model) "
            "first, or load the original model"
        )
    plan = plan.for_model(base)
    quantizer = base.__dict__.get("hf_quantizer")
    if quantizer is not None:
        if saving:
            _check_can_be_saved(base, quantizer)
        plan.inner = (
            quantizer.quantization_config.to_dict()
        )  # the plan takes its place in config.json
    fitting = Fitting(stats, kernels, new := {})
    prepared = []
    for site, part in plan.by_site():
        new[site.slot] = site.prepare(base, part, fitting)
        prepared.append((site, new[site.slot]))
    install(base, plan, prepared, present)
    return model


def install(
    model: PreTrainedModel,
    plan: SoftheadsConfig,
    prepared: Sequence[tuple[Site, Any]],
    present: SoftheadsConfig | None,
) -> None:
    """Put prepared modules in, probe them and write the plan into the config; if anything fails, put all back."""
    before = _settings(model)
    old: dict[str, Any] = {}
    done: list[tuple[Site, Any]] = []
    bridge.subclass_patched(model)
    try:
        for site, new in prepared:
            old[site.slot] = site.present(model)
            done.append((site, old[site.slot]))
            site.install(model, new)
        for site, new in prepared:
            site.probe(model, new)
        parts = {**(present.parts if present else {}), **plan.parts}
        mark(model, (present or plan).with_parts(parts))
        bridge.name_in_memory(model)
    except BaseException:
        for site, taken in reversed(done):
            site.restore(model, taken)
        _put_back(_changed(before, model))
        if present is None:
            bridge.restore_class(model)
        raise
    changed = _Settings([*_changed(before, model), *model.__dict__.get(_SETTINGS, [])])
    remember_taken_out(model, {**taken_out(model), **old})
    model.__dict__[_SETTINGS] = changed


def unpatch(model: M) -> M:
    """Put back what `patch` took out, bit for bit: modules, hooks, ties, the config and the class.

    Raises:
        ValueError: the model was not patched in this process (a loaded checkpoint no longer holds the dense head).
    """
    base = bridge.transformers_model(model)
    plan = plan_of(base)
    if plan is None:
        raise ValueError("this model is not patched")
    old = taken_out(base)
    for site, _ in plan.by_site():  # those that may refuse come first
        site.check_restore(old.get(site.slot))
    for site, _ in reversed(list(plan.by_site())):
        site.restore(base, old.get(site.slot))
    unmark(base)
    remember_taken_out(base, {})
    _put_back(base.__dict__.pop(_SETTINGS, []))
    bridge.restore_class(base)
    return model


def _check_can_be_saved(model: PreTrainedModel, quantizer: Any) -> None:
    """Raise ValueError if transformers would refuse to save a model with this quantizer."""
    if quantizer.is_serializable():
        return
    config = quantizer.quantization_config
    method = getattr(config.quant_method, "value", config.quant_method)
    if hasattr(config, "dequantize"):
        way_out = f"with quantization_config={type(config).__name__}(dequantize=True)"
    else:
        way_out = "without that quantizer"
    raise ValueError(
        f"the weights of this {type(model).__name__} are quantized with {method}, which transformers cannot save, so "
        f"what a fit finds now would be lost; load it {way_out}, or give saving=False if it will not be saved"
    )


# -- settings of the model and its configs that a patch changes --------------------------------------------------------

_Setting = tuple[dict[str, Any], str, Any]  # the dictionary that holds it, its name, its old value


class _Settings(list[_Setting]):
    """Kept on the model; of a class of its own, since `torch.export` goes through every list and dict that it finds
    there, and these hold the model's own attributes."""


def _settings(model: PreTrainedModel) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The attributes of the model and of every config in it, and a copy of them."""
    from transformers import PreTrainedModel

    owners = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    owners.append(model.config.get_text_config())
    holders = {id(owner): owner.__dict__ for owner in owners}
    return [(fields, dict(fields)) for fields in (*holders.values(), model.__dict__)]


def _changed(
    before: Sequence[tuple[dict[str, Any], dict[str, Any]]], model: PreTrainedModel
) -> list[_Setting]:
    found = []
    for fields, old in before:
        for name in fields.keys() | old.keys():
            value = old.get(name, _MISSING)
            if fields.get(name, _MISSING) is not value and not name.startswith(_OWN):
                found.append((fields, name, value))
    return found


def _put_back(settings: Sequence[_Setting]) -> None:
    for fields, name, value in settings:
        if value is _MISSING:
            fields.pop(name, None)
        else:
            fields[name] = value
