"""Every attention variant in every setting that changes its code path, and random inputs for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import hf_softheads.attention  # noqa: F401 - registers the variants
from hf_softheads.attention.base import AttentionSpec, Geometry, attend
from hf_softheads.registry import spec_from_dict, variants

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "adaptive_temperature": [{"long": [0.0, 2.42], "long_from": 1.0}, {"train_through": False}],
    "asentmax": [{"adaptive": False}],
    "elu": [{"normalised": False}, {"features": True}],
    "based": [{"dim": None}],
    "cosformer": [{"length": 160}],
    "entmax": [{"alpha": 1.25}, {"alpha": 2.5}, {"learn": True}],
    "gated_delta": [{"shortest": 2, "longest": 8}],
    "gated": [{"per": "head"}],
    "identity": [{"normalised": False}],
    "lolcats": [
        {"window": 4, "features": 6},
        {"window": 4, "features": 6, "shape": "terraced"},
    ],
    "log_n": [{"length": 4}],
    "lssar": [{"p": 3}],
    "mixed": [{"other": {"name": "gated"}, "start": 0.4}, {"other": "learned_sink"}],
    "mala": [{"a": "code"}],
    "rebased": [{"dim": None}],
    "relu": [{"power": 2}, {"divide": "length", "length": 17}, {"divide": "none"}],
    "sa_softmax": [{"normalised": False}],
    "selective": [{"position": "linear"}, {"position": "sigmoid", "token": True}],
    "sigmoid": [
        {"bias": -3.0, "alibi": True},
        {"row_bias": "log_n", "divide": "sqrt_n"},
        {"row_bias": "lse"},
        {"divide": "n"},
        {"divide": "sum"},
    ],
    "sliding_window": [{"window": 4, "sinks": 1}, {"window": 3, "sinks": 0, "dilation": 2}],
    "ssmax": [{"bias": True}],
    "swat": [{"window": 6}, {"window": 5, "slopes": "negative"}],
    "taylor_softmax": [{"terms": 5}],
    "top_k": [{"k": 4}, *({"k": 4, "rest": r} for r in ("mean", "linear", "quadratic"))],
}
ENCODERS = ("soft",)
"""Refuse to be causal, as every call of the contract is; they have tests of their own."""
SPECS: list[AttentionSpec] = [
    spec_from_dict("attention", {"name": name, **setting})
    for name in variants("attention")
    if name not in ENCODERS
    for setting in [{}, *SETTINGS.get(name, [])]
]
SLACK = {"rebased": 50.0}
"""Times the rounding of others: the square of a score near 0 is a small difference of large products of features."""
ROW_MAPS = [s for s in SPECS if s._overrides("weights")]


def label(spec: AttentionSpec) -> str:
    fresh = type(spec)()
    changed = [f"{k}={v}" for k, v in spec.to_dict().items() if v != fresh.to_dict()[k]]
    return "-".join([spec.name, *changed]).replace(" ", "")


@dataclass(frozen=True)
class Sample:
    """Arguments of one `attend` call."""

    spec: AttentionSpec
    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None = None
    params: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

    def __call__(self, **changes: Any) -> Tensor:
        s = replace(self, **changes)
        return attend(s.spec, s.query, s.key, s.value, s.keep, params=s.params, hidden=s.hidden)

    def leaves(self) -> dict[str, Tensor]:
        tensors = {"query": self.query, "key": self.key, "value": self.value, **self.params}
        return tensors if self.hidden is None else {**tensors, "hidden": self.hidden}

    def to(self, dtype: torch.dtype) -> Sample:
        params = {n: p.to(dtype) for n, p in self.params.items()}
        hidden = None if self.hidden is None else self.hidden.to(dtype)
        rest = {n: getattr(self, n).to(dtype) for n in ("query", "key", "value")}
        return replace(self, params=params, hidden=hidden, **rest)

    def requires_grad(self) -> Sample:
        fresh = {n: t.detach().clone().requires_grad_() for n, t in self.leaves().items()}
        params = {n: fresh[n] for n in self.params}
        rest = {n: fresh[n] for n in ("query", "key", "value")}
        return replace(self, params=params, hidden=fresh.get("hidden"), **rest)

    def grads(self, out: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Gradients of all leaves; zeros for those that the output does not depend on."""
        leaves = self.leaves()
        found = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
        return {
            n: torch.zeros_like(t) if g is None else g
            for (n, t), g in zip(leaves.items(), found, strict=True)
        }


def sample(
    spec: AttentionSpec,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 11,
    keys: int | None = None,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    keep: Tensor | None = None,
    seed: int = 0,
) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    keys = queries if keys is None else keys
    width = 12
    geometry = Geometry(heads=heads, kv_heads=kv_heads, head_dim=dim, hidden_size=width)
    params = {
        n: p.to(dtype) + 0.3 * normal(*p.shape) for n, p in spec.init_params(geometry).items()
    }
    return Sample(
        spec,
        normal(batch, heads, queries, dim) * scale,
        normal(batch, kv_heads, keys, dim),
        normal(batch, kv_heads, keys, dim),
        keep,
        params,
        normal(batch, queries, width) if spec.needs_hidden else None,
    )


def left_padded(lengths: list[int], total: int) -> Tensor:
    """Causal mask `(B, 1, T, T)` of left-padded rows; the padding's own queries see nothing."""
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    real = torch.stack([torch.arange(total) >= total - n for n in lengths])
    return causal & real[:, None, None, :]
