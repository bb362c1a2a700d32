"""The keys of one call and those before it: which of them count, and in which form sums over them are computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_softheads.attention.call import Inputs, own_key
from hf_softheads.attention.engines import Choice
from hf_softheads.attention.linear import delta, forms
from hf_softheads.attention.linear.forms import Kernel


class Form(NamedTuple):
    """What a description says of a form."""

    TITLE: str
    COMPILED: bool = False


FORMS = {
    "quadratic": Form("whole matrix"),
    "chunked": Form("chunks and a state"),
    "recurrent": Form("a state, token by token"),
}


class Past:
    """Sums over the keys that each query of a call sees, for a spec to build its output from.

    Padding is taken out of features and decays here, after the feature map, whose value at 0 is not 0. A state is read
    and written in the order of the calls of `sum`; `close` moves it on.

    Raises:
        ValueError: an unknown form, a mask that this form or the state cannot follow, a bias or dropout.
    """

    def __init__(self, name: str, inputs: Inputs):
        self.inputs = inputs
        self.heads, self.queries = inputs.query.shape[1:3]
        self.keys = inputs.key.shape[2]
        self.state = inputs.state
        _refuse(name, inputs)
        self.real, follows = _real_keys(inputs)
        single = self.queries == 1 and self.state is None  # a row of weights is less than a state
        self.form = inputs.form or ("chunked" if follows and not single else "quadratic")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if not follows and (self.form != "quadratic" or self.state is not None):
            raise ValueError(
                f"this call's mask is not causal with padding (it has packed sequences or a window), which the "
                f"{self.form} form of {name} cannot follow; use form='quadratic' without a state"
            )
        if self.form == "quadratic" and self.state is not None:
            raise ValueError("a state holds no keys for the quadratic form; use another form")
        if inputs.trace is not None:
            inputs.trace(Choice(FORMS[self.form], ()))
        self._read = 0
        self._written: list[Tensor] = []

    @property
    def total(self) -> bool:
        """Every query sees all the keys: encoders, and a single query."""
        return self.queries == 1 or not (self.inputs.causal or self.inputs.keep is None)

    @property
    def length(self) -> int:
        """Tokens of the text so far, this call's keys and padding included."""
        return self.keys + (0 if self.state is None else self.state.seen)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Indices of the queries `(1|B, 1, Q, 1)` and of the keys `(1, 1, K, 1)` in the text."""
        before = self.length - self.keys
        keys = torch.arange(self.keys, device=self.inputs.key.device).view(1, 1, -1, 1)
        return own_key(self.inputs).unsqueeze(-1) + before, keys + before

    def mean(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        eps: float,
        kernel: Kernel | None = None,
    ) -> Tensor:
        """`Σ w v / (Σ w + ε)`."""
        sums, total = self.sum(query, key, value, kernel=kernel)
        return sums / (total + eps)

    def sum(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None = None,
        kernel: Kernel | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`Σ w v` and `Σ w` over the keys that a query sees, `w = φ(q)·φ(k)`, times what the decay leaves of it.

        Args:
            query, key: features `(B, H, Q, F)` and `(B, H|Hkv, K, F)`.
            value: `(B, Hkv, K, Dv)`.
            log_decay: `(1|B, H, K)`, at most 0; an expanded view where it is one number for all tokens.
            kernel: the same w without features, where a matrix of them is computed anyway.
        """
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        if self.real is not None:
            value = value.masked_fill(~self.real, 0.0)
            if log_decay is not None:
                log_decay = log_decay.masked_fill(~self.real.squeeze(-1), 0.0)
        value = forms.repeated(value, key.shape[1])
        if self.form == "quadratic":
            out = self._quadratic(query, key, value, log_decay, kernel)
        else:
            out = self._by_state(query, key, value, log_decay, kernel)
        return out[..., :-1], out[..., -1:]

    def delta(
        self, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor
    ) -> Tensor:
        """What the gated delta rule reads, `(B, H, Q, Dv)`; see `delta`."""
        if self.real is not None:
            real = self.real.squeeze(-1)
            beta, log_decay = beta.masked_fill(~real, 0.0), log_decay.masked_fill(~real, 0.0)
        if self.form == "quadratic":
            return delta.quadratic(query, key, value, beta, log_decay, self.keep())
        empty = query.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
        run = delta.chunked if self.form == "chunked" else delta.recurrent
        out, state = run(query, key, value, beta, log_decay, (self.held() or (empty,))[0])
        self.hold((state,))
        return out

    def held(self) -> tuple[Tensor, ...]:
        """All that the state holds, for a spec with a way of its own; nothing at the beginning of a text."""
        return () if self.state is None else self.state.tensors

    def hold(self, tensors: tuple[Tensor, ...]) -> None:
        """What the state is to hold instead."""
        self._written.extend(tensors)

    def close(self) -> None:
        """Leave what was found to the next call."""
        if self.state is not None:
            new = torch.full_like(self.inputs.query[:, 0, 0, 0], self.keys, dtype=torch.long)
            if self.real is not None:
                new = self.real.flatten(1).sum(1).expand_as(new)
            self.state.tensors = tuple(self._written)
            self.state.real = new if self.state.real is None else self.state.real + new
            self.state.seen += self.keys

    def keep(self) -> Tensor:
        """Who sees whom, bool `(1|B, 1|H, Q, K)`."""
        if self.inputs.keep is not None:
            return self.inputs.keep
        shape = (1, 1, self.queries, self.keys)
        seen = torch.ones(shape, dtype=torch.bool, device=self.inputs.key.device)
        return seen.tril(self.keys - self.queries)

    def _quadratic(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        kernel: Kernel | None,
    ) -> Tensor:
        keep = self.keep()
        product = (query, key) if kernel is None else (kernel.query, kernel.key)
        weights = product[0] @ forms.repeated(product[1], self.heads).mT
        weights = weights if kernel is None else kernel.of(weights)
        if log_decay is not None:
            passed = log_decay.double().cumsum(-1)  # differences of large sums
            own = own_key(self.inputs).expand(*passed.shape[:2], -1)
            if passed.shape[0] < own.shape[0]:
                passed = passed.expand(own.shape[0], -1, -1)
            weights = weights * forms.faded(passed.gather(-1, own), passed, keep).to(weights)
        return forms.quadratic(weights, value, keep)

    def _by_state(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor | None,
        kernel: Kernel | None,
    ) -> Tensor:
        state = self._next(query.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1]))
        if self.total:
            state = forms.folded(key, value, log_decay, state)
            self._written.append(state)
            return forms.read(query, state)
        lead = self.keys - self.queries
        if lead:
            passing = None if log_decay is None else log_decay[..., :lead]
            state = forms.folded(key[:, :, :lead], value[:, :, :lead], passing, state)
            log_decay = None if log_decay is None else log_decay[..., lead:]
        key, value = key[:, :, lead:], value[:, :, lead:]
        if self.form == "recurrent":
            out, state = forms.recurrent(query, key, value, log_decay, state)
        else:
            if kernel is not None:
                kernel = kernel._replace(key=kernel.key[:, :, lead:])
            out, state = forms.chunked(query, key, value, log_decay, state, kernel)
        self._written.append(state)
        return out

    def _next(self, empty: Tensor) -> Tensor:
        """What the state holds for the next sum; nothing at the beginning of a text."""
        if self.state is None or not self.state.tensors:
            return empty
        self._read += 1
        return self.state.tensors[self._read - 1]


def _refuse(name: str, inputs: Inputs) -> None:
    if inputs.dropout:
        raise ValueError(
            f"{name} has no single weights to drop, and this layer asks for attention dropout {inputs.dropout}; set "
            "the model's attention dropout to 0"
        )
    if inputs.bias is not None and not torch.compiler.is_compiling() and inputs.bias.any():
        raise ValueError(
            f"{name} has no scores that a bias could be added to, and this layer adds one; leave its layers to "
            "variants that have scores"
        )


def _real_keys(inputs: Inputs) -> tuple[Tensor | None, bool]:
    """The keys that are no padding, bool `(1|B, 1, K, 1)`, None for all; and whether the mask says no more than so."""
    keep, queries = inputs.keep, inputs.query.shape[2]
    if keep is None:
        return None, True
    if keep.shape[1] > 1 or (
        torch.compiler.is_compiling() and inputs.state is None and queries > 1
    ):
        return keep.any(-2, keepdim=True).any(1, keepdim=True).mT, False
    last = keep[:, :, -1:]
    if inputs.causal and queries > 1:
        full = torch.ones(keep.shape[-2:], dtype=torch.bool, device=keep.device)
        whole = last & full.tril(keep.shape[-1] - queries)
    else:
        whole = last
    if torch.compiler.is_compiling() or torch.equal(keep, whole.expand_as(keep)):
        return last.mT, True
    return keep.any(-2, keepdim=True).mT, False
