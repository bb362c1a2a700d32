"""What every attention variant is: a spec that turns scores into weights, or queries into scaled queries.

A variant overrides one of two methods of `AttentionSpec`, or both:

* `weights(scores, keep, params)`: another row map.
* `scale_queries(query, n_keys, params, hidden)`: the softmax with another temperature.

Which engine computes it (`engines/`) is not the variant's business. It may say more about its row map, by which faster
engines recognise it: `row_map` its name and constants, `score_form` what it does to a single score, `sink_logits` that
it is a softmax with one more key.

A variant that is more than a row map (normalised keys, an output gate, a mixture) overrides `forward`; one that keeps a
state of fixed size instead of keys and values derives from `linear.base.LinearSpec`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_softheads.attention import engines
from hf_softheads.attention.call import (
    SOFTMAX,
    Call,
    Geometry,
    Inputs,
    NewValues,
    Params,
    RowMap,
    ScoreForm,
    State,
    wide,
)
from hf_softheads.registry import Spec


@dataclass(frozen=True)
class AttentionSpec(Spec, kind="attention"):
    """An attention variant: hyper-parameters, parameters and the map from scores to weights.

    The class-level tags describe the map; `docs/variants.md` lists them.
    """

    sums_to_one: ClassVar[bool] = True
    exact_zeros: ClassVar[bool] = False  # among the keys that are visible
    sinks: ClassVar[bool] = True  # heads still need a key to dump weight on
    training_free: ClassVar[bool] = False  # a pretrained model keeps its quality without training
    decode_safe: ClassVar[bool] = True  # a step over a cache equals the full forward
    needs_hidden: ClassVar[bool] = False  # reads the layer's input
    tempers_values: ClassVar[bool] = False  # changes values before they enter a cache
    has_state: ClassVar[bool] = False  # decodes from a state of fixed size, without keys and values
    takes_sinks: ClassVar[bool] = False  # starts from the sinks of a model that has them (gpt-oss)

    def for_pretrained(self) -> AttentionSpec:
        """As `patch` puts it into a trained model: fields left as None get the value that starts closest to softmax."""
        return self

    def init_params(self, geometry: Geometry) -> dict[str, Tensor]:
        """Fresh parameters by name, fp32."""
        return {}

    def scale_queries(
        self, query: Tensor, n_keys: Tensor, params: Params, hidden: Tensor | None
    ) -> Tensor:
        """Query `(B, H, Q, D)` fp32 times a temperature; `n_keys (1|B, 1|H, Q, 1)` is at least 1."""
        return query

    def temper_values(self, value: Tensor, hidden: Tensor, params: Params) -> Tensor:
        """Values `(B, Hkv, T, Dv)` as they enter a cache, for variants with `tempers_values`; hidden `(B, T, …)`."""
        return value

    def weights(self, scores: Tensor, keep: Tensor, params: Params) -> Tensor:
        """Scores `(B, H, Q, K)` fp32 to weights: exactly 0 where `~keep`, a row that keeps nothing is 0 throughout."""
        return softmax(scores, keep)

    def weights_vjp(
        self, scores: Tensor, keep: Tensor, params: Params, grad: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The weights and the gradients of scores and parameters; override where a closed form is faster."""
        return autograd_vjp(self.weights, scores, keep, params, grad)

    def row_map(self) -> RowMap | None:
        """The name that equals `weights` in an engine's table of row maps; None where no table has it, as for maps with
        parameters."""
        return None if self._overrides("weights") else SOFTMAX

    def score_form(self, inputs: Inputs, params: Params) -> ScoreForm | None:
        """This row map as a function of single scores; None where it is none. Override it together with `weights`."""
        return None if self._overrides("weights") else ScoreForm()

    def sink_logits(self, inputs: Inputs, params: Params) -> Tensor | None:
        """`(H,)`: the row map is a softmax over one more key a head, of this score and of value 0; None: it is not."""
        return None

    def forward(self, inputs: Inputs, params: Params) -> Tensor:
        """Attention output `(B, H, Q, Dv)`, fp32 or the inputs' dtype."""
        if self._overrides("scale_queries"):
            query = wide(inputs.query)
            scaled = self.scale_queries(query, inputs.n_keys().clamp(min=1), params, inputs.hidden)
            inputs = inputs.replace(query=scaled)
        return engines.attend(Call(self, inputs, params))

    def module(self, geometry: Geometry) -> AttentionVariant:
        """The module that a patched layer holds as its child `softheads`."""
        return AttentionVariant(self, geometry)

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(AttentionSpec, method)


class AttentionVariant(nn.Module):
    """A spec with its parameters: what an attention layer calls instead of its softmax.

    Parameters are registered under the names that `init_params` gives and read only inside `forward`, so that
    offloading, FSDP and PEFT may move them."""

    kernels: Literal["auto", "off", "require"] = "auto"

    def __init__(self, spec: AttentionSpec, geometry: Geometry):
        super().__init__()
        self.spec, self.geometry = spec, geometry
        for name, value in spec.init_params(geometry).items():
            self.register_parameter(name, nn.Parameter(value))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter; called by transformers for keys that a checkpoint lacks."""
        with torch.device("cpu"):
            fresh = self.spec.init_params(self.geometry)
        for name, value in fresh.items():
            parameter = getattr(self, name)
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(value)

    def forward(self, inputs: Inputs | NewValues) -> Tensor:
        """`(B, H, Q, Dv)` in the query's dtype; for `NewValues`, its values as they enter the cache."""
        params = dict(self.named_parameters(recurse=False))
        if isinstance(inputs, NewValues):
            return self.spec.temper_values(inputs.value, inputs.hidden, params)
        return run(self.spec, params, inputs.replace(compiled=self.kernels != "off"))

    def engines(self, like: Tensor, queries: int = 2, dropout: float = 0.0) -> list[engines.Choice]:
        """Which engine computes a causal call of `queries` queries in the dtype and on the device of `like`, and why
        those asked before it do not; one for each row map of the variant."""
        shape = self.geometry
        query = like.new_zeros(1, shape.heads, queries, shape.head_dim)
        key = like.new_zeros(1, shape.kv_heads, queries, shape.head_dim)
        chosen: list[engines.Choice] = []
        inputs = Inputs(
            query=query,
            key=key,
            value=key,
            keep=None,
            scaling=1.0,
            hidden=like.new_zeros(1, queries, shape.hidden_size),
            dropout=dropout,
            compiled=self.kernels != "off",
            trace=chosen.append,
        )
        with torch.no_grad():
            run(self.spec, dict(self.named_parameters(recurse=False)), inputs)
        return chosen

    def extra_repr(self) -> str:
        return repr(self.spec)


def attend(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    *,
    params: Params | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
    causal: bool = True,
    form: str | None = None,
    state: State | None = None,
) -> Tensor:
    """Attention with any variant, as a function: what tests, kernels and patched models all go through.

        scores = query @ repeat(key).mT * scaling
        return spec.weights(scores, keep) @ repeat(value)

    in blocks of queries, never a `(Q, K)` matrix per head; scores and weights are fp32 (float64 for float64 inputs).

    Args:
        query: `(B, H, Q, D)`.
        key, value: `(B, Hkv, K, D)` with `H` a multiple of `Hkv`.
        keep: bool, broadcastable to `(B, H, Q, K)`; None is causal with offset `K - Q`.
        params: as `spec.init_params` names them; None takes the fresh ones.
        scaling: default `D ** -0.5`.
        softcap, bias, hidden, causal: see `Inputs`.
        form: how a variant with `has_state` computes: "quadratic" is the definition, with a `(Q, K)` matrix, "chunked"
            is linear in the length, "recurrent" goes token by token. None takes what suits the call.
        state: what such a variant knows of earlier keys; `key` and `value` are then the new ones alone, and the state
            is moved on. An empty `State()` begins a text.

    Returns:
        `(B, H, Q, D)` in the query's dtype. A query that sees no key gives exactly 0, with gradient 0.

    Raises:
        ValueError: shapes that do not fit, missing or unknown parameters, a variant that needs `hidden`, a form or a
            state for a variant that has none.
        TypeError: `keep` is not boolean.
    """
    _check_shapes(query, key, value)
    geometry = Geometry(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[-1],
        hidden_size=hidden.shape[-1] if hidden is not None else 0,
    )
    if params is None:
        params = {k: v.to(query.device) for k, v in spec.init_params(geometry).items()}
    else:
        _check_names(spec, geometry, params)
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        keep=keep,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        bias=bias,
        hidden=hidden,
        causal=causal,
        form=form,
        state=state,
    )
    return run(spec, params, inputs)


def run(spec: AttentionSpec, params: Params, inputs: Inputs) -> Tensor:
    """`attend` on prepared arguments; `params` are not checked."""
    _check_shapes(inputs.query, inputs.key, inputs.value)
    if spec.needs_hidden and inputs.hidden is None:
        raise ValueError(
            f"{spec.name} reads the layer's input: pass hidden=(B, Q, hidden_size), the tensor that the layer's "
            "query projection reads"
        )
    if not spec.has_state and (inputs.form is not None or inputs.state is not None):
        raise ValueError(f"{spec.name} has no other form and no state; leave form and state out")
    inputs = inputs.replace(keep=_four_dimensional(inputs.keep, inputs.query, inputs.key))
    with torch.autocast(inputs.query.device.type, enabled=False):  # fp32 inside means fp32
        return spec.forward(inputs, params).to(inputs.query.dtype)


def autograd_vjp(
    weights: Callable[[Tensor, Tensor, Params], Tensor],
    scores: Tensor,
    keep: Tensor,
    params: Params,
    grad: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The weights of one block and the gradients of its scores and of the parameters, by autograd."""
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        leaves = {n: p.detach().requires_grad_(p.requires_grad) for n, p in params.items()}
        out = weights(leaf, keep, leaves)
    trained = [n for n, p in leaves.items() if p.requires_grad]
    if not out.requires_grad:  # a map that is constant in the scores
        return out, torch.zeros_like(scores), {}
    wanted = [leaf, *(leaves[n] for n in trained)]
    grads = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    by_name = {n: g for n, g in zip(trained, grads[1:], strict=True) if g is not None}
    return out.detach(), grads[0] if grads[0] is not None else torch.zeros_like(scores), by_name


def softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept keys; 0 elsewhere, also in rows that keep nothing."""
    return lowered(scores, keep).softmax(-1) * keep


def lowered(scores: Tensor, keep: Tensor) -> Tensor:
    """Finite scores, with about the dtype's lowest number where `~keep`; four times faster than `masked_fill`."""
    lowest = torch.finfo(scores.dtype).min
    return scores + torch.zeros_like(keep, dtype=scores.dtype).masked_fill_(~keep, lowest)


def per_head(parameter: Tensor) -> Tensor:
    """`(H,)` to `(1, H, 1, 1)`."""
    return parameter.view(1, -1, 1, 1)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"expected (B, H, Q, D) and twice (B, Hkv, K, D), got {shapes}")
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key differ in batch or head dimension: {shapes}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value differ in batch, heads or length: {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads: {shapes}")


def _check_names(spec: AttentionSpec, geometry: Geometry, params: Params) -> None:
    if torch.compiler.is_compiling():
        return
    with torch.device("meta"):
        known = spec.init_params(geometry).keys()
    if params.keys() != known:
        raise ValueError(
            f"{spec.name} has the parameters {', '.join(known) or 'none'}, got {', '.join(params) or 'none'}"
        )


def _four_dimensional(keep: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """`keep` as `(1|B, 1|H, Q, K)`, a view."""
    full = (*query.shape[:3], key.shape[2])
    if keep is None:
        if full[2] > full[3]:
            raise ValueError(
                f"{full[2]} queries and only {full[3]} keys cannot be causal; pass keep"
            )
        return None
    if keep.dtype != torch.bool:
        raise TypeError(
            f"keep must be a boolean mask (True = may attend), got {keep.dtype}; "
            "an additive mask becomes one by `mask > torch.finfo(mask.dtype).min / 2`"
        )
    padded = keep[(None,) * (4 - keep.ndim)] if keep.ndim < 4 else keep
    fits = padded.ndim == 4 and all(k in (1, n) for k, n in zip(padded.shape, full, strict=True))
    if not fits:
        raise ValueError(
            f"keep of shape {tuple(keep.shape)} does not broadcast to (B, H, Q, K) = {full}"
        )
    return padded.expand(-1, -1, full[2], full[3])
