"""The only file that changes a model: `patch` and `unpatch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_softheads import bridge, checkpoint
from hf_softheads.attention import native
from hf_softheads.attention.base import AttentionSpec, AttentionVariant
from hf_softheads.config import SoftheadsConfig
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.softpool import ClassifierSpec, PooledClassifier
from hf_softheads.kernels import KernelUnavailable
from hf_softheads.probing import probe
from hf_softheads.registry import did_you_mean

if TYPE_CHECKING:
    from hf_softheads.stats import HeadStats

M = TypeVar("M", bound=nn.Module)
Mode = Literal["auto", "off", "require"]


@dataclass
class Original:
    """What `unpatch` needs: the modules and settings that a patch took out."""

    head: nn.Module | None = None
    tied: bool = False
    tied_keys: dict[str, str] | None = None
    attention: str | None = None


def patch(
    model: M,
    head: HeadSpec | ClassifierSpec | Mapping[str, Any] | str | None = None,
    attention: AttentionSpec | Mapping[Any, Any] | str | None = None,
    layers: Sequence[int] | None = None,
    *,
    stats: HeadStats | None = None,
    kernels: Mode = "auto",
) -> M:
    """Replace the LM head, the attention softmax, or both, in place; the new parts start from the trained weights.

    The model stays an instance of its own architecture: `generate`, `Trainer`, PEFT and `save_pretrained` work as
    before, and the saved folder loads with `AutoModelForCausalLM.from_pretrained` after `import hf_softheads`.

    Args:
        model: a transformers model (or a PEFT model around one), with its weights loaded.
        head: a head variant such as `heads.VQ(codes=4096)`; for a sequence classifier `heads.SoftPool()`.
        attention: an attention variant such as `attention.SSMax()`, or `{layer: variant}`.
        layers: the layers that get `attention`; default all.
        stats: what `collect` found, for fits that use it.
        kernels: "auto" computes with C++ kernels where they apply, "off" never does, "require" refuses to patch where
            one is missing. It holds for this process: nothing of it is saved. `describe` says what runs.

    Returns:
        The same model.

    Raises:
        ValueError: anything that cannot be done, with the reason, before anything has changed.
        TypeError: `model` is not a transformers model.
        KernelUnavailable: `kernels` is "require", but a part has no kernel, or it cannot be built here.
    """
    if kernels not in (modes := ("auto", "off", "require")):
        raise ValueError(f"patch has no kernels={kernels!r}; {did_you_mean(str(kernels), modes)}")
    plan = SoftheadsConfig(head=head, attention=attention, layers=layers).for_pretrained()
    if plan.head is None and plan.attention is None:
        raise ValueError("nothing to do: give head=…, attention=…, or both")
    base = base_model(model)
    present = checkpoint.plan_of(base)
    for part in ("head", "attention"):
        if present is not None and getattr(plan, part) and (there := getattr(present, part)):
            raise ValueError(
                f"this model's {part} is already patched with {there}; call hf_softheads.unpatch(model) first, or "
                "load the original model"
            )
    new_head: Head | PooledClassifier | None = None
    if isinstance(plan.head, ClassifierSpec):
        if kernels == "require":
            _require(f"classifier {plan.head.name}", "there is none for this variant")
        new_head = bridge.fresh_classifier(base, plan.head)
    elif plan.head is not None:
        new_head = _fitted_head(base, plan.head, stats, kernels)
    variants = _fresh_variants(base, plan, kernels)
    original = original_of(base)
    before = _remember(base, original)
    try:
        if new_head is not None:
            if isinstance(new_head, Head):
                original.head = base.get_output_embeddings()
                install_head(base, new_head)
            else:
                install_classifier(base, new_head)
        if variants:
            original.attention = base.config._attn_implementation
            install_attention(base, variants)
            probe(base, variants)
        if present is not None:
            plan = SoftheadsConfig(
                head=plan.head or present.head,
                attention=plan.attention or present.attention,
                layers=plan.layers or present.layers,
                inner=present.inner,
            )
        checkpoint.mark(base, plan)
    except BaseException:
        _restore(base, *before, new_head is not None, variants)
        raise
    object.__setattr__(base, "_softheads_original", original)
    return model


def unpatch(model: M) -> M:
    """Put back what `patch` took out, bit for bit.

    Raises:
        ValueError: the model was not patched in this process (a loaded checkpoint no longer holds the dense head).
    """
    base = base_model(model)
    plan = checkpoint.plan_of(base)
    original = base.__dict__.get("_softheads_original")
    if plan is None:
        raise ValueError("this model is not patched")
    if isinstance(plan.head, HeadSpec) and (original is None or original.head is None):
        raise ValueError(
            "the dense head is no longer there: this model was loaded from a patched checkpoint; load the original one"
        )
    original = original or Original(attention="sdpa")
    _restore(base, original, None, plan.head is not None, bridge.attention_layers(base))
    base.__dict__.pop("_softheads_original", None)
    return model


def dense_head(model: nn.Module) -> nn.Module:
    """The head that `patch` took out: the teacher for a repair on the same hidden states.

    Raises:
        ValueError: the model was not patched in this process.
    """
    original = base_model(model).__dict__.get("_softheads_original")
    if original is None or original.head is None:
        raise ValueError(
            "this model does not hold its dense head: it was loaded from a patched checkpoint, or its head was never "
            "patched; load the original model and give its get_output_embeddings()"
        )
    head: nn.Module = original.head
    return head


# -- steps shared with the loader --------------------------------------------------------------------------------------


def install_head(model: PreTrainedModel, head: Head) -> None:
    """Put a head in place of the output embedding and untie it from the input embedding."""
    path, _ = bridge.find_head(model)
    bridge.adopt(model)
    model.set_output_embeddings(head)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None:
        model.all_tied_weights_keys = {
            target: source
            for target, source in tied.items()
            if not (target.startswith(f"{path}.") or source.startswith(f"{path}."))
        }


def install_classifier(model: PreTrainedModel, classifier: PooledClassifier) -> None:
    """Put a pooling classifier around a sequence classifier's last module."""
    name, _ = bridge.find_classifier(model)
    bridge.adopt(model)
    setattr(model, name, classifier)


def install_attention(model: PreTrainedModel, variants: dict[int, AttentionVariant]) -> None:
    """Give the chosen layers their variant and route the model's attention through it."""
    layers = bridge.attention_layers(model)
    for index, variant in variants.items():
        module = layers[index][1]
        module.add_module(bridge.CHILD, variant)
        if variant.spec.needs_hidden:
            module.register_forward_pre_hook(bridge.show_hidden, with_kwargs=True)
    bridge.adopt(model)
    model.set_attn_implementation(bridge.IMPLEMENTATION)


def build_variants(model: PreTrainedModel, plan: SoftheadsConfig) -> dict[int, AttentionVariant]:
    """Fresh modules for the plan's layers.

    Raises:
        ValueError: the family computes its attention itself, or a layer does not exist.
    """
    if plan.attention is None:
        return {}
    layers = bridge.attention_layers(model)
    if not layers or not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) computes its attention itself instead of through "
            "transformers' attention interface, so its softmax cannot be replaced; its head can"
        )
    built = {}
    for i, spec in plan.attention_by_layer(len(layers)).items():
        index, (path, module) = list(layers.items())[i]
        bridge.check_values(path, module, spec)
        built[index] = spec.module(bridge.geometry(model, index, module))
    return built


# -- details -----------------------------------------------------------------------------------------------------------


def original_of(model: PreTrainedModel) -> Original:
    """What was patched out of this model, empty if nothing was."""
    found: Original = model.__dict__.get("_softheads_original") or Original()
    return found


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside any wrapper. Raises TypeError if there is none."""
    inner = bridge.base_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    return inner


def _fitted_head(
    model: PreTrainedModel, spec: HeadSpec, stats: HeadStats | None, kernels: Mode
) -> Head:
    path, dense = bridge.find_head(model)
    weight: Tensor = dense.weight
    bias: Tensor | None = getattr(dense, "bias", None)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device.type == "meta":
            raise ValueError(
                f"{path}.{name} is not in memory (meta device or offloaded to disk); load the model without "
                "offloading, patch it, save it, and offload what you saved"
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{path}.{name} is quantized ({tensor.dtype}); patch the head of the original model"
            )
        bad = sum(int((~torch.isfinite(part)).sum()) for part in tensor.split(8192))
        if bad:
            raise ValueError(
                f"{path}.{name} holds {bad} NaN or infinite values; a fit would spread them"
            )
    vocab, dim = weight.shape
    spec.check(dim, vocab)
    if stats is not None:
        stats.check(dim, vocab)
    with torch.device(weight.device):
        head = spec.module(dim, vocab, bias=bias is not None)
    head.use_kernels(kernels)
    if kernels == "require":
        _require(f"head {spec.name}", head.why_no_kernel())
    head.transform = bridge.logit_transform(model)
    spec.fit(head, weight.detach(), None if bias is None else bias.detach().float(), stats)
    cast(head, weight.dtype)
    head.requires_grad_(weight.requires_grad)
    head.train(dense.training)
    if hasattr(dense, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(head, dense._hf_hook)
    return head


def cast(head: Head | PooledClassifier, dtype: torch.dtype) -> None:
    """Parameters to `dtype`, but for those that the head keeps in fp32."""
    for name, parameter in head.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(
                torch.float32 if name in head.keep_in_fp32 else dtype
            )


def _fresh_variants(
    model: PreTrainedModel, plan: SoftheadsConfig, kernels: Mode
) -> dict[int, AttentionVariant]:
    variants = build_variants(model, plan)
    layers = bridge.attention_layers(model)
    for index, variant in variants.items():
        device = next(p.device for p in layers[index][1].parameters())
        if device.type == "meta":
            raise ValueError(
                f"{layers[index][0]} is not in memory (meta device or offloaded); patch before offloading"
            )
        variant.kernels = kernels
        if kernels == "require":
            _require(f"attention {variant.spec.name}", native.lacking(variant.spec))
        variant.to(device=device, dtype=torch.float32)
        variant.reset_parameters()
        bridge.take_sinks(layers[index][1], variant)
        variant.train(layers[index][1].training)
    return variants


def _require(part: str, lacking: str | None) -> None:
    if lacking is not None:
        raise KernelUnavailable(
            f'kernels="require", but the {part} cannot be computed by a kernel: {lacking}; with kernels="auto" torch '
            "computes it"
        )


def _remember(model: PreTrainedModel, original: Original) -> tuple[Original, Any]:
    if original.head is None:
        config = model.config.get_text_config()
        original.tied = bool(getattr(config, "tie_word_embeddings", False))
        original.tied_keys = dict(getattr(model, "all_tied_weights_keys", {}) or {})
    return original, checkpoint.plan_of(model)


def _restore(
    model: PreTrainedModel, original: Original, plan: Any, head: bool, layers: Mapping[int, Any]
) -> None:
    if layers and original.attention is not None:
        for _, module in bridge.attention_layers(model).values():
            module._modules.pop(bridge.CHILD, None)
            bridge.forget_hidden(module)
        model.set_attn_implementation(original.attention)
    if head and (classifier := bridge.active_classifier(model)) is not None:
        setattr(model, bridge.find_classifier(model)[0], classifier.inner)
    if head and original.head is not None:
        model.set_output_embeddings(original.head)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = original.tied
        model.all_tied_weights_keys = original.tied_keys
        original.head = None
    checkpoint.mark(model, plan)
    if plan is None:
        bridge.disown(model)
