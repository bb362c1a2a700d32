"""Saving and loading: how a patched folder loads with plain `AutoModelForCausalLM.from_pretrained`.

transformers offers one hook that may change a model's structure before its weights are read: a quantizer. Ours
rebuilds the plan's modules on the meta device, lets transformers load into them as into any other (sharded,
dispatched, in any dtype), and then removes every mark of a quantized model, so that training, PEFT and compilation
see an ordinary one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from hf_softheads import bridge, patching
from hf_softheads.config import METHOD, SoftheadsConfig
from hf_softheads.imports import after_import
from hf_softheads.plan import MARKERS, mark

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SoftheadsQuantizer(HfQuantizer):
    """transformers' loading hooks for a `SoftheadsConfig`."""

    requires_calibration = False

    def __init__(self, quantization_config: SoftheadsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized: bool
        self.patched: bool = self.pre_quantized  # the folder is; else patch after loading
        self.inner: HfQuantizer | None = None
        if quantization_config.inner is not None:
            inner = dict(quantization_config.inner)
            written = inner.pop("pre_quantized", self.patched)  # else quantized while loading
            self.inner = auto.AutoHfQuantizer.from_config(inner, pre_quantized=written)
            self.pre_quantized = written

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.inner is not None:
            self.inner.validate_environment(*args, **kwargs)

    def update_attn_implementation(self, config: Any) -> Any:
        # the marker has done its work; the real implementation is set when the variants are in place
        for marker in MARKERS:
            config.__dict__.pop(marker, None)
        if config._attn_implementation == bridge.IMPLEMENTATION:
            config._attn_implementation = None
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Older transformers have no `update_attn_implementation`; this is their hook before the model is built."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_files(kwargs.get("checkpoint_files") or [])
        if self.patched:
            self._build_structure(model)
        if self.inner is not None:  # after ours: it skips a head that is no nn.Linear
            self.inner._process_model_before_weight_loading(model, **kwargs)

    def _build_structure(self, model: PreTrainedModel) -> None:
        """Put the plan's modules, still empty, where the checkpoint expects them."""
        plan: SoftheadsConfig = self.quantization_config
        in_fp32: set[str] = set()
        bridge.subclass_patched(model)
        built = []
        for site, part in plan.by_site():
            if site.is_in(model):
                with torch.device("meta"):
                    built.append((site, site.build(model, part)))
        for site, new in built:
            site.install(model, new)
            in_fp32 |= site.in_fp32(model, new)
        _keep_in_fp32(model, in_fp32)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        plan: SoftheadsConfig = self.quantization_config
        if self.inner is not None:
            self.inner._process_model_after_weight_loading(model, **kwargs)
            model.hf_quantizer = self.inner
            model.quantization_method = self.inner.quantization_config.quant_method
            plan.inner = {k: v for k, v in dict(plan.inner or {}).items() if k != "pre_quantized"}
        else:
            _remove_quantized_marks(model)
        if self.patched:
            bridge.subclass_patched(model)
            for site, _ in plan.by_site():
                if site.is_in(model):
                    site.loaded(model)
            mark(model, plan)
        else:
            stats = plan.stats
            del model.config.quantization_config
            patching.patch(model, stats=stats, **plan.keywords())
            model.config.quantization_config.inner = plan.inner

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return self.inner is None or bool(self.inner.is_serializable(*args, **kwargs))

    @property
    def is_trainable(self) -> bool:
        return self.inner is None or bool(self.inner.is_trainable)


# What a quantizer of the backbone may override, passed on to it.
def _forward_to_inner(name: str) -> Any:
    def method(self: SoftheadsQuantizer, *args: Any, **kwargs: Any) -> Any:
        target = (
            getattr(super(SoftheadsQuantizer, self), name)
            if self.inner is None
            else getattr(self.inner, name)
        )
        return target(*args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    "update_dtype",
    "update_device_map",
    "adjust_max_memory",
    "param_element_size",
    "param_needs_quantization",
    "get_quantize_ops",
    "get_weight_conversions",
    "update_weight_conversions",
    "get_state_dict_and_metadata",
):
    if hasattr(HfQuantizer, _name):
        setattr(SoftheadsQuantizer, _name, _forward_to_inner(_name))


def _register() -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SoftheadsConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = SoftheadsQuantizer


after_import(auto.__name__, _register)  # a reload makes these tables anew


def _keep_in_fp32(model: Any, names: set[str]) -> None:
    """Exempt parameters from the dtype that the user loads with."""
    model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | names
    if isinstance(getattr(model, "dtype_plan", None), dict):  # transformers 5.0 made it already
        model.dtype_plan.update(dict.fromkeys(names, torch.float32))


def _remove_quantized_marks(model: PreTrainedModel) -> None:
    from transformers import PreTrainedModel

    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)


def check_files(files: Iterable[str | Path]) -> None:
    """Refuse a truncated or damaged safetensors file before anything is loaded.

    Raises:
        ValueError: names the file.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        try:
            with safe_open(str(file), framework="pt"):
                pass  # opening checks the header against the file's length
        except SafetensorError as error:
            raise ValueError(
                f"{file} is truncated or damaged ({error}); download or export it again"
            ) from error
