"""A model as one GGUF file, which llama.cpp runs: the body as it is, the head's rows chosen on the type's own grid."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads import bridge
from hf_softheads.exporting.gguf_model import (
    Architecture,
    architecture_of,
    named_tensors,
    write_settings,
)
from hf_softheads.exporting.gguf_tokenizer import write_tokenizer
from hf_softheads.exporting.writing import Writing
from hf_softheads.heads.fit.blockwise import scores_of
from hf_softheads.heads.fit.ggml_types import BLOCK, TYPES, Blocks, GgmlType, fit_blocks
from hf_softheads.heads.fit.hessian import local_moments
from hf_softheads.heads.stats import HeadStats
from hf_softheads.losses.base import kl_divergence
from hf_softheads.plan import plan_of
from hf_softheads.registry import did_you_mean

FILE = "model.gguf"
BODIES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 8.5 / 8}
"""Bytes a weight of the body, by type."""
_STATES = 1024  # on which types are compared
_TRIED = 3  # types
_QUANTIZATION_VERSION = 2


def prepare(
    model: Any,
    tokenizer: Any,
    bits: float = 4.5,
    head: str | None = None,
    body: str = "f16",
    stats: HeadStats | None = None,
) -> Writing:
    """`model.gguf`, for transformers' `gguf_file=` and for llama.cpp.

    Args:
        bits: of the head, per weight with everything included: of the types within, the one that loses least is taken.
        head: a type instead: Q4_0, IQ4_NL, Q4_1, Q5_0, Q5_1 or Q8_0.
        body: f16, bf16, f32 or q8_0 for all other matrices.
        stats: what `collect` found. With them rows are rounded with error feedback in the metric of the hidden states,
            and types are compared by the KL divergence from the dense head; without, by the squared error of the rows.

    Raises:
        ImportError: gguf is not installed.
        ValueError: no tokenizer, an architecture or a setting that the file has no place for, a patched model, or an
            unknown type.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "format='gguf' needs gguf; run `pip install hf_softheads[gguf]`"
        ) from error
    types = _types(bits, head)
    _check_name(body, BODIES, "body type")
    if plan_of(model) is not None:
        raise ValueError(
            "format='gguf' rounds the dense head's rows itself and cannot hold patched parts; give the original model, "
            "or the one that sh.unpatch(model) puts back"
        )
    if tokenizer is None:
        raise ValueError("format='gguf' holds the tokenizer too; give tokenizer=")
    architecture = architecture_of(model)
    path, dense = bridge.find_head(model)
    weight: Tensor = dense.weight.detach()
    if weight.shape[1] % BLOCK:
        raise ValueError(
            f"the head has {weight.shape[1]} columns; types of ggml need a multiple of {BLOCK}"
        )
    if getattr(dense, "bias", None) is not None:
        raise ValueError(f"format='gguf' has no place for {path}.bias")
    if stats is not None:
        stats.check(weight.shape[1], weight.shape[0])
    _check_read_back(model, tokenizer, architecture)
    blocks = _best(weight, types, stats)
    tied = bool(bridge.tied_embeddings(model))
    tables = {f"{path}.weight"}
    if tied:
        tables |= {f"{place}.weight" for place in bridge.tied_embeddings(model)}

    def write(folder: Path) -> None:
        _write(folder / FILE, model, tokenizer, architecture, body, blocks, tables, tied)

    rest = sum(t.numel() for name, t in model.state_dict().items() if name not in tables)
    return Writing(int(rest * BODIES[body] + weight.numel() * blocks.type.bits / 8), write)


def _types(bits: float, head: str | None) -> list[GgmlType]:
    """The types to try.

    Raises:
        ValueError: an unknown name, or fewer bits than the smallest type has.
    """
    if head is not None:
        _check_name(head.upper(), TYPES, "head type")
        return [TYPES[head.upper()]]
    within = [kind for kind in TYPES.values() if kind.bits <= bits]
    if not within:
        least = min(kind.bits for kind in TYPES.values())
        raise ValueError(f"no type of ggml fits into {bits} bits; the smallest has {least}")
    return within[-1:] if within[-1].width == 8 else within[-_TRIED:]


def _check_name(name: str, known: Any, what: str) -> None:
    if name not in known:
        raise ValueError(f"format='gguf' has no {what} {name!r}; {did_you_mean(name, known)}")


@torch.no_grad()
def _best(weight: Tensor, types: list[GgmlType], stats: HeadStats | None) -> Blocks:
    """The rows in the type that loses least."""
    metrics = None if stats is None else local_moments(stats, weight)
    found = [fit_blocks(weight, kind, metrics) for kind in types]
    if len(found) == 1:
        return found[0]
    if stats is None:
        return min(found, key=lambda b: float((b.rows() - weight.float()).square().mean()))
    states = stats.states[:_STATES].to(weight.device)
    return min(found, key=lambda blocks: _divergence(blocks, weight, states))


def _divergence(blocks: Blocks, weight: Tensor, states: Tensor) -> float:
    """Mean KL divergence from the dense head on hidden states, nats."""
    rows, total = blocks.rows(), 0.0
    for h in states.split(max(1, 2**24 // len(weight))):
        dense = scores_of(h, weight).log_softmax(-1)
        total += float(kl_divergence(dense, F.linear(h.float(), rows).log_softmax(-1)).sum())
    return total / len(states)


def _write(
    file: Path,
    model: Any,
    tokenizer: Any,
    architecture: Architecture,
    body: str,
    blocks: Blocks,
    tables: set[str],
    tied: bool,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, architecture.name)
    _write_head_of_file(writer, model, tokenizer, architecture)
    kind = gguf.GGMLQuantizationType[blocks.type.name]
    table = blocks.packed().cpu().numpy()
    writer.add_tensor("token_embd.weight" if tied else "output.weight", table, raw_dtype=kind)
    for name, tensor in named_tensors(model, architecture, without=tables):
        fits = tensor.ndim > 1 and (body != "q8_0" or tensor.shape[-1] % BLOCK == 0)
        stored = gguf.GGMLQuantizationType[body.upper() if fits else "F32"]
        if stored == gguf.GGMLQuantizationType.F16 and not bool(
            torch.isfinite(tensor.half()).all()
        ):
            raise ValueError(f"{name} holds numbers beyond fp16; give body='bf16'")
        packed = gguf.quants.quantize(tensor.contiguous().numpy(), stored)
        writer.add_tensor(name, packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_head_of_file(
    writer: Any, model: Any, tokenizer: Any, architecture: Architecture
) -> None:
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    write_settings(writer, model, architecture, Path(name).name)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    write_tokenizer(writer, tokenizer, model.config.vocab_size)


# settings that say nothing of what a model computes, or that the file holds elsewhere
_APART = {
    *("architectures", "dtype", "transformers_version", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "attention_dropout"),
    *("pretraining_tp", "tie_word_embeddings", "quantization_config"),
}
_SAMPLE = "def f(x):\n    return x ** 2  # 1234 naïve façade, 東京 🙂\n\n\tIt's  done; isn't it?"


def _check_read_back(model: Any, tokenizer: Any, architecture: Architecture) -> None:
    """Refuse a model or a tokenizer that transformers would read differently from the file.

    Raises:
        ValueError: names the settings, or shows the text.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = gguf.GGUFWriter(Path(folder) / FILE, architecture.name)
        _write_head_of_file(writer, model, tokenizer, architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        config = AutoConfig.from_pretrained(folder, gguf_file=FILE).to_dict()
        again = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    own = model.config.to_dict()
    known = {k for k in own.keys() & config.keys() - _APART if not k.startswith("_")}
    differ = sorted(k for k in known if not _same(own[k], config[k]))
    if differ:
        said = ", ".join(f"{k}={own[k]!r} (read as {config[k]!r})" for k in differ)
        raise ValueError(
            f"format='gguf' has no place for settings of this {type(model).__name__}: {said}; export it with "
            "format='transformers'"
        )
    if again(_SAMPLE).input_ids != tokenizer(_SAMPLE).input_ids:
        raise ValueError(
            f"a GGUF file would cut text differently than this {type(tokenizer).__name__}: {_SAMPLE!r} becomes "
            f"{again.tokenize(_SAMPLE)} instead of {tokenizer.tokenize(_SAMPLE)}"
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one.get(k), other.get(k)) for k in one.keys() | other.keys())
    if isinstance(one, float) or isinstance(other, float):
        close = isinstance(one, int | float) and isinstance(other, int | float)
        return close and abs(one - other) <= 1e-6 * abs(other)
    return bool(one == other)
