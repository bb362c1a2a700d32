"""A quantized head as a plain packed checkpoint of the compressed-tensors format, for software without this package.

The head's tensors become `weight_packed (V, ⌈D bits / 32⌉)` int32, `weight_scale (V, G)` and `weight_shape`: codes of
`bits` bits from the lowest bits up, `row = scale · (code - 2**(bits - 1))`. Everything else stays as it is.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_softheads import bridge
from hf_softheads.bitpack import pack
from hf_softheads.embeddings.head_rows import RowsEmbedding, RowsTwin
from hf_softheads.exporting.writing import Writing
from hf_softheads.files import human_bytes
from hf_softheads.heads.fit.blockwise import blocks
from hf_softheads.heads.quantized import QuantizedHead
from hf_softheads.plan import MARKERS, plan_of
from hf_softheads.sites.lm_head import head_of

_BITS = (4, 8)
_COULD = (
    "it holds `quantized` heads of 4 or 8 bits with levels='integers' and frequent=0, one scale a row or group "
    "(`softheads patch MODEL --head quantized --set head.bits=4 --set head.group=64 --set head.levels=integers`); "
    "format='transformers' holds every head"
)


def prepare(model: Any, tokenizer: Any) -> Writing:
    """The checkpoint of a model whose head the format can hold as it is.

    Raises:
        ValueError: it cannot; names the heads that it could.
    """
    head = _checked_head(model)
    path, _ = bridge.find_head(model)
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for name in list(tensors):
        if name.startswith(f"{path}.") and name != f"{path}.bias":
            del tensors[name]
    tensors |= {f"{path}.{name}": tensor for name, tensor in _packed(head).items()}
    for place, module in _row_readers(model).items():
        for name in list(tensors):
            if name.startswith(f"{place}."):
                del tensors[name]
        tensors[f"{place}.weight"] = rows = _rows(module)
        warnings.warn(
            f"{place} reads the rows of the head, which format='compressed-tensors' cannot hold: it is written as a "
            f"dense matrix of {human_bytes(rows.numel() * rows.element_size())}",
            stacklevel=2,
        )
    config = _config(model, path, head)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=tensors)
        config.save_pretrained(folder)  # in place of the one that names this package
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    return Writing(sum(t.numel() * t.element_size() for t in tensors.values()), write)


def _checked_head(model: Any) -> QuantizedHead:
    """The head, if the format holds it and all else that the model is patched with.

    Raises:
        ValueError: it does not.
    """
    plan, head = plan_of(model), head_of(model)
    refused = "format='compressed-tensors' cannot hold"
    if plan is None or head is None:
        raise ValueError(f"{refused} the dense head of this {type(model).__name__}; {_COULD}")
    if (
        type(head) is not QuantizedHead
        or not head.integers
        or head.frequent
        or head.bits not in _BITS
    ):
        raise ValueError(f"{refused} the head {plan.head.short()}; {_COULD}")
    if others := sorted(plan.parts.keys() - {"head", "tie"}):
        raise ValueError(
            f"{refused} the patched {', '.join(others)} of this model, which runs only with this package; export it "
            "with format='transformers', or patch the head alone"
        )
    if plan.inner is not None:
        raise ValueError(
            f"{refused} a body that is quantized with {plan.inner.get('quant_method')}; load the model unquantized"
        )
    return head


def _packed(head: QuantizedHead) -> dict[str, Tensor]:
    """The head's matrix as the format names its tensors."""
    codes = torch.empty(head.out_features, head.in_features, dtype=torch.uint8)
    for which in blocks(head.out_features):
        codes[which] = head._codes(which).cpu()
    words = pack(codes, head.bits)
    words = F.pad(words, (0, -words.shape[1] % 4)).contiguous()
    return {
        "weight_packed": words.view(torch.int32),
        "weight_scale": head.weight.detach(),
        "weight_shape": torch.tensor([head.out_features, head.in_features]),
    }


def _row_readers(model: Any) -> dict[str, RowsEmbedding]:
    """The embedding that reads the head's rows, by its path.

    Raises:
        ValueError: several modules do.
    """
    found = {p: m for p, m in model.named_modules() if isinstance(m, RowsEmbedding)}
    if any(isinstance(module, RowsTwin) for module in model.modules()):
        raise ValueError(
            f"format='compressed-tensors' cannot hold a {type(model).__name__}, which reads its head's rows in several "
            "places; patch it with tie=False"
        )
    return found


@torch.no_grad()
def _rows(module: RowsEmbedding) -> Tensor:
    """The dense matrix `(V, D)` that the embedding reads, in its own dtype; the family's factor is not in it."""
    ids = torch.arange(module.num_embeddings, device=module.weight.device)
    parts = [RowsEmbedding.forward(module, ids[which]) for which in blocks(len(ids))]
    return torch.cat(parts)


def _config(model: Any, path: str, head: QuantizedHead) -> Any:
    """The model's config without a word of this package; its head is untied and packed."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", *MARKERS):
        config.__dict__.pop(name, None)
    config._attn_implementation = None
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    grouped = head.group != head.in_features
    weights = {
        "num_bits": head.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": head.group if grouped else None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    scheme = {"targets": [path], "weights": weights, "input_activations": None}
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme, "output_activations": None}},
        "ignore": [],
        "kv_cache_scheme": None,
    }
    return config
