"""Heads with a C++ kernel for their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.hardware import bf16_is_fast
from hf_softheads.heads.base import Head
from hf_softheads.heads.forms import scores_operator
from hf_softheads.heads.forms.scores_operator import Rebuilt
from hf_softheads.heads.forms.streamed_rows import RowsHead
from hf_softheads.kernels import (
    STATES,
    KernelUnavailable,
    in_large_pages,
    instructions,
    select,
    why_not,
)

_DTYPES = torch.float32, torch.bfloat16, torch.float16


class KernelRowsHead(Rebuilt, RowsHead):
    """A `RowsHead` that is scored by C++ kernels outside of training.

    A variant names its `kernel` (a file of `kernels/`) and implements `compiled`, which scores few states straight from
    the codes, and `unpacked_product` for many. Few states are rounded to 15 bits: a kernel is nearer to fp32 than a
    bf16 product is. In evaluation mode gradients are those of the plain definition, computed when they are asked for.
    Where one of torch's own operators does the same (`torch_operator`), it needs no kernel.
    """

    kernel: str
    by_matrix_unit = STATES  # up to so many bf16 states `compiled` is ahead on a processor with AMX

    def compiled(self, hidden: Tensor) -> Tensor:
        """Scores `(B, V)` fp32 of `hidden (B, D)` in the order of the tokens, without the bias."""
        raise NotImplementedError

    def unpacked_product(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Products `(…, n)` of prepared states `x (…, K)`, fp32 or bf16, with rows start … stop - 1, one of `blocks`.

        Differentiable in x alone.
        """
        raise NotImplementedError

    def torch_operator(self) -> str | None:
        """Name of torch's own operator that `compiled` calls here, also where kernels are off; None for a kernel."""
        return None

    def why_no_kernel(self) -> str | None:
        if self.weight.device.type not in ("cpu", "meta"):
            return "only on a CPU"
        return why_not(self.kernel)

    def kernel_or_reason(self, hidden: Tensor) -> str | None:
        """Why neither the kernel nor `torch_operator` scores these hidden states; None if one does.

        Raises:
            KernelUnavailable: `kernels` is "require", but this machine or this head cannot.
        """
        own = self.torch_operator() is not None
        if self.kernels == "off" and not own:
            return "switched off"
        if hidden.dtype not in _DTYPES:
            reason: str | None = "only for fp32, bf16 and fp16 hidden states"
        elif self.training and torch.is_grad_enabled() and self._differentiable(hidden):
            reason = "not in training"
        elif self.latent is not None:
            reason = "not while codes are trained"
        else:
            reason = None if own else self.why_no_kernel()
        if self.kernels == "require" and not own and (lacking := self.why_no_kernel()):
            raise KernelUnavailable(
                f"the kernel of this {self.kernel} head cannot be used: {lacking}"
            )
        return reason

    def _differentiable(self, hidden: Tensor) -> bool:
        return hidden.requires_grad or any(p.requires_grad for p in self.parameters())

    @property
    def backend(self) -> str:
        with torch.no_grad():
            reason = self.kernel_or_reason(self.weight.new_zeros(1, self.in_features))
        if reason is not None:
            return f"torch ({reason})"
        lacking = "switched off" if self.kernels == "off" else self.why_no_kernel()
        way = (
            f"torch, {self.torch_operator()}"
            if self.torch_operator()
            else f"C++, {select(self.kernel).instructions}"
        )
        way += f" instead of a kernel: {lacking}" if self.torch_operator() and lacking else ""
        return f"{way} (torch in training)"

    def scores(self, hidden: Tensor) -> Tensor:
        if self.kernel_or_reason(hidden) is not None:
            return super().scores(hidden)
        scores = scores_operator.scores(self, hidden.reshape(-1, self.in_features))
        return scores.view(*hidden.shape[:-1], self.out_features)

    def operator_scores(self, hidden: Tensor) -> Tensor:
        if self._by_codes(hidden):
            scores = self.compiled(hidden)
        elif (dtype := self._unpacked_dtype(hidden)) is not None:
            scores = self.by_blocks(self.prepare(hidden).to(dtype))
        else:
            return RowsHead.scores(self, hidden)
        if self.bias is not None:
            places = self.row_of_token()
            scores += self.bias if places is None else self.bias.index_select(0, places)
        return scores

    def plain_scores(self, hidden: Tensor) -> Tensor:
        return RowsHead.scores(self, hidden)

    def _by_codes(self, hidden: Tensor) -> bool:
        """Are these states scored faster from the codes than from rows that are unpacked?"""
        way, count = instructions(self.kernel), hidden.numel() // self.in_features
        if count > STATES and self._unpacked_dtype(hidden) == torch.bfloat16:
            return way.endswith("AMX") and count <= self.by_matrix_unit
        own = self.torch_operator() is not None
        return count <= STATES or own or way.startswith("AVX-512")

    def by_blocks(self, x: Tensor) -> Tensor:
        """Scores `(B, V)` fp32 of many prepared states, fp32 or bf16, in the order of the tokens, without the bias."""
        out = in_large_pages(len(x), self.out_features, dtype=torch.float32)
        for start, stop in self.blocks():
            out[:, start:stop] = self.unpacked_product(x, start, stop)
        places = self.row_of_token()
        return out if places is None else out.index_select(1, places)

    def _unpacked_dtype(self, x: Tensor) -> torch.dtype | None:
        """Dtype of the rows that a kernel unpacks for states x; None where torch rebuilds them, with gradients."""
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        usable = self.kernels != "off" and self.latent is None and x.dtype in _DTYPES
        if trained or not usable or torch.compiler.is_compiling() or x.device.type != "cpu":
            return None
        if why_not("rows") is not None:
            return None
        half = x.dtype == torch.bfloat16 and bf16_is_fast(x.device)
        return torch.bfloat16 if half else torch.float32

    def _block(self, x: Tensor, start: int, stop: int) -> Tensor:
        dtype = self._unpacked_dtype(x)
        if dtype is None:
            return super()._block(x, start, stop)
        scores = self.unpacked_product(x.to(dtype), start, stop).float()
        return scores if self.bias is None else scores + self.bias[start:stop]

    # With the kernel all scores of a few states are cheaper than blocks of rows.

    def _owner(self, hidden: Tensor) -> type[Head]:
        if self.kernel_or_reason(hidden) is not None:
            return RowsHead
        return Head if self._by_codes(hidden) else RowsHead

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self._owner(hidden).log_prob(self, hidden, labels)

    def logsumexp(self, hidden: Tensor) -> Tensor:
        return self._owner(hidden).logsumexp(self, hidden)

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        owner = self._owner(hidden)
        return owner.token_numbers(self, hidden, labels, temperature, moments)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return self._owner(hidden).topk(self, hidden, k)

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._owner(hidden).topk_logsumexp(self, hidden, k, temperature)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        owner = self._owner(hidden)
        return owner.sample(self, hidden, temperature=temperature, generator=generator)
