"""What GGUF calls the tensors and settings of a model, by architecture, and how llama.cpp lays them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOCAL = 6  # every sixth layer of Gemma 3 sees everything


@dataclass(frozen=True)
class Architecture:
    """A model type that can be written."""

    name: str
    layout: Callable[[Any, str, Tensor], Tensor]  # config, name, tensor → as llama.cpp keeps it
    settings: Callable[[Any, Any], None]  # a GGUFWriter and the config
    lacks: Callable[[Any], dict[str, Any]]  # settings of a config that the file cannot say


def _llama_layout(config: Any, name: str, tensor: Tensor) -> Tensor:
    """llama.cpp rotates neighbouring pairs of a head's columns."""
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = counts.get(name.split(".")[-2])
    if count is None:
        return tensor
    pairs = tensor.reshape(count, 2, -1, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _llama_settings(writer: Any, config: Any) -> None:
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _llama_lacks(config: Any) -> dict[str, Any]:
    wanted = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    return {k: getattr(config, k) for k, v in wanted.items() if getattr(config, k, v) != v}


def _gemma3_layout(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Gemma multiplies by 1 + weight, llama.cpp by the weight."""
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _gemma3_settings(writer: Any, config: Any) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)


def _gemma3_lacks(config: Any) -> dict[str, Any]:
    count = config.num_hidden_layers
    layers = ["sliding_attention" if (i + 1) % _LOCAL else "full_attention" for i in range(count)]
    wanted = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "layer_types": layers,
        "query_pre_attn_scalar": config.head_dim,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }
    found = {k: getattr(config, k) for k, v in wanted.items() if getattr(config, k, v) != v}
    if getattr(config, "use_bidirectional_attention", False):
        found["use_bidirectional_attention"] = True
    local = (config.rope_parameters or {}).get("sliding_attention") or {}
    if local and (local.get("rope_type"), local.get("rope_theta")) != ("default", 10_000.0):
        found["rope_parameters of sliding_attention"] = local
    return found


ARCHITECTURES = {
    "llama": Architecture("llama", _llama_layout, _llama_settings, _llama_lacks),
    "gemma3_text": Architecture("gemma3", _gemma3_layout, _gemma3_settings, _gemma3_lacks),
}
"""By the model type of transformers."""


def architecture_of(model: Any) -> Architecture:
    """The architecture of a model that can be written.

    Raises:
        ValueError: it cannot; names those that can, or the settings that the file has no place for.
    """
    config = model.config
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        could = " and ".join(ARCHITECTURES)
        raise ValueError(
            f"format='gguf' cannot hold a {type(model).__name__} ({config.model_type}); it writes {could}"
        )
    lacks = found.lacks(config)
    rope = _rope(config)
    if rope.get("rope_type", "default") != "default":
        lacks["rope_parameters"] = rope
    if lacks:
        said = ", ".join(f"{name}={value}" for name, value in lacks.items())
        raise ValueError(
            f"format='gguf' has no place for settings of this {type(model).__name__}: {said}; export it with "
            "format='transformers'"
        )
    return found


def _rope(config: Any) -> dict[str, Any]:
    """The rotation of layers that see everything."""
    rope = config.rope_parameters or {}
    return dict(rope.get("full_attention") or rope)


def write_settings(writer: Any, model: Any, architecture: Architecture, name: str) -> None:
    """The file's description of the model."""
    config = model.config
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10_000.0)))
    architecture.settings(writer, config)


def named_tensors(
    model: Any, architecture: Architecture, *, without: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors but for some, by their names in the file and as llama.cpp keeps them.

    Raises:
        ValueError: a tensor has no name in this architecture.
    """
    import gguf

    which = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture.name)
    names = gguf.get_tensor_name_map(which, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in without:
            continue
        written = names.get_name(name, (".weight", ".bias"))
        if written is None:
            raise ValueError(
                f"format='gguf' has no name for {name} in a {architecture.name} model; take it out, or export with "
                "format='transformers'"
            )
        yield (
            written,
            architecture.layout(model.config, name, tensor.detach().to("cpu", torch.float32)),
        )
