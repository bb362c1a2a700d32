"""Torch as on a processor without AVX-512, bf16 products and integer products (VNNI).

Python imports this when it starts with this folder on PYTHONPATH; `pytest --processor=avx2` puts it there for the
processes that tests start. What torch itself runs is lowered by the variables that `make lowered` sets.
"""

from __future__ import annotations

import types

import torch

_LARGER = ("avx512", "avx10", "avx_vnni", "avx_ne", "amx")
_FOUND = torch.cpu.get_capabilities()
_LESS = types.MappingProxyType(
    {name: False if name.startswith(_LARGER) else value for name, value in _FOUND.items()}
)
torch.cpu.get_capabilities = lambda: _LESS
torch.cpu._is_vnni_supported = lambda: False
