"""Heads whose decoding step has a C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_softheads.heads.base import Head
from hf_softheads.heads.forms.streamed_rows import RowsHead
from hf_softheads.kernels import KernelUnavailable, select

_STATES = 64  # more are faster by rebuilding the rows


class KernelRowsHead(RowsHead):
    """A `RowsHead` that a kernel scores straight from its codes, for few hidden states and without gradients.

    A variant names its `kernel` (a file of `kernels/`) and implements `compiled`. fp32 hidden states keep the plain
    path unless `kernels` is "require": a kernel is nearer to fp32 than a bf16 product is, not equal to it. Where one of
    torch's own operators does the same (`torch_operator`), it needs no kernel.
    """

    kernel: str

    def compiled(self, hidden: Tensor) -> Tensor:
        """Scores `(B, V)` fp32 of `hidden (B, D)` in the order of the tokens, without the bias."""
        raise NotImplementedError

    def torch_operator(self) -> str | None:
        """Name of torch's own operator that `compiled` calls here, also where kernels are off; None for a kernel."""
        return None

    def why_no_kernel(self) -> str | None:
        if self.weight.device.type not in ("cpu", "meta"):
            return "only on a CPU"
        return select(self.kernel).reason

    def kernel_or_reason(self, hidden: Tensor) -> str | None:
        """Why neither the kernel nor `torch_operator` scores these hidden states; None if one does.

        Raises:
            KernelUnavailable: `kernels` is "require", but this machine or this head cannot.
        """
        if torch.compiler.is_compiling():
            return "not inside torch.compile"
        own = self.torch_operator() is not None
        if self.kernels == "off" and not own:
            return "switched off"
        if hidden.dtype == torch.float32 and self.kernels != "require":
            reason: str | None = (
                "only for bf16 and fp16 hidden states, fp32 ones are scored in fp32"
            )
        elif torch.is_grad_enabled() and (
            hidden.requires_grad or any(p.requires_grad for p in self.parameters())
        ):
            reason = "no gradients"
        elif self.latent is not None:
            reason = "not while codes are trained"
        elif hidden.numel() > _STATES * self.in_features:
            reason = f"more than {_STATES} hidden states at once"
        else:
            reason = None if own else self.why_no_kernel()
        if self.kernels == "require" and not own and (lacking := self.why_no_kernel()):
            raise KernelUnavailable(
                f"the kernel of this {self.kernel} head cannot be used: {lacking}"
            )
        return reason

    @property
    def backend(self) -> str:
        with torch.no_grad():
            probe = self.weight.new_zeros(1, self.in_features, dtype=torch.bfloat16)
            reason = self.kernel_or_reason(probe)
        if reason is not None:
            return f"torch ({reason})"
        lacking = "switched off" if self.kernels == "off" else self.why_no_kernel()
        way = (
            f"torch, {self.torch_operator()}"
            if self.torch_operator()
            else f"C++, {select(self.kernel).instructions}"
        )
        way += f" instead of a kernel: {lacking}" if self.torch_operator() and lacking else ""
        return f"{way} (few states, no gradients), else torch"

    def scores(self, hidden: Tensor) -> Tensor:
        if self.kernel_or_reason(hidden) is not None:
            return super().scores(hidden)
        scores = self.compiled(hidden.reshape(-1, self.in_features))
        if self.bias is not None:
            places = self.row_of_token()
            scores += self.bias if places is None else self.bias.index_select(0, places)
        return scores.view(*hidden.shape[:-1], self.out_features)

    # With the kernel all scores of a few states are cheaper than blocks of rows.

    def _owner(self, hidden: Tensor) -> type[Head]:
        return RowsHead if self.kernel_or_reason(hidden) is not None else Head

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
    def topk_log_prob(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.kernel_or_reason(hidden) is not None:
            return super().topk_log_prob(hidden, k)
        z = self.logits(hidden)
        values, tokens = z.topk(k, -1)
        return values - z.logsumexp(-1, keepdim=True), tokens

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        owner = self._owner(hidden)
        return owner.sample(self, hidden, temperature=temperature, generator=generator)
