"""Rows in 8, 4, 3 or 2 bits per weight, rounded so that the logits change least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import PARTS, index_dtype, pack_bits, unpack_bits
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.blockwise import blocks
from hf_softheads.heads.fit.gptq import coordinate_descent, round_through, round_with_feedback
from hf_softheads.heads.fit.group_scales import group_scales, refit_scales
from hf_softheads.heads.fit.hessian import local_moments, rows_by_moment
from hf_softheads.heads.fit.kmeans import Rows, require_finite
from hf_softheads.heads.forms.kernel_rows import KernelRowsHead
from hf_softheads.kernels.onednn import int8_packed, int8_scores, why_no_int8
from hf_softheads.kernels.quantized import quantized_scores
from hf_softheads.kernels.rows import quantized_rows
from hf_softheads.registry import Count, CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_GROUP = 64  # columns per scale up to 4 bits, where nothing else is asked for


@dataclass(frozen=True)
class Quantized(HeadSpec, name="quantized"):
    """`row_v = s_vg (q_v - m)`, one scale s per row and group of `group` columns, q in `bits` bits.

    Without `HeadStats` q is round-to-nearest. With them columns are rounded one by one and each column's error is
    compensated in the columns after it (GPTQ, arXiv 2210.17323), in the metric `E[p_v (1 - p_v) h hᵀ]` of a row's own
    contexts (`local_moments`): this minimises the change of the distribution, not of the weights.

    Attributes:
        bits: 8, 6, 5, 4, 3 or 2.
        group: columns per scale; must divide D. None: the whole row. "auto": 64 up to 4 bits, where 64 divides D, else
            the whole row.
        frequent: rows of so many of the most frequent tokens, by `HeadStats`, keep 8 bits.
        levels: "halves", `m = (2**bits - 1) / 2`, lie evenly around 0; "integers", `m = 2**(bits - 1)`, are those of
            the formats that servers read, so that a head of 4 or 8 bits can be exported as it is.
    """

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group: Count | Literal["auto"] | None = "auto"
    frequent: CountOrZero = 0
    levels: Literal["halves", "integers"] = "halves"

    def __post_init__(self) -> None:
        if self.levels == "integers" and len(PARTS[self.bits]) > 1:
            raise ValueError(
                f"quantized has levels='integers' with 8, 4 or 2 bits, got {self.bits} bits"
            )

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        few: tuple[Literal[2, 3, 4], ...] = (2, 3, 4)
        low = [cls(bits, frequent=count) for bits in few for count in (0, vocab // 32)]
        return [*low, cls(5), cls(6), cls(8)]

    def columns(self, dim: int) -> int:
        """How many columns of D share a scale."""
        if self.group == "auto":
            return _GROUP if self.bits <= 4 and dim % _GROUP == 0 else dim
        return self.group or dim

    def check(self, dim: int, vocab: int) -> None:
        if dim % self.columns(dim):
            valid = [g for g in (16, 32, 64, 128, 256) if dim % g == 0]
            raise ValueError(
                f"quantized asked for groups of {self.group} of {dim} columns; they must divide it: {valid}"
            )

        if self.frequent >= vocab:
            raise ValueError(
                f"quantized asked for 8 bits for {self.frequent} frequent tokens; 0 to {vocab - 1} are possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> QuantizedHead:
        group = self.columns(dim)
        integers = self.levels == "integers"
        return QuantizedHead(
            dim, vocab, self.bits, group, bias=bias, frequent=self.frequent, integers=integers
        )

    @torch.no_grad()
    def fit(
        self, head: QuantizedHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        order = None
        if head.tokens is None:
            metrics = None if stats is None else local_moments(stats, weight)
            head.store(
                *quantize_rows(weight, self.bits, head.group, metrics, integers=head.integers)
            )
        else:
            if stats is None:
                raise ValueError(
                    f"{self} needs the token frequencies; pass stats=sh.collect(model, batches)"
                )
            order = stats.frequency.argsort(descending=True, stable=True).to(weight.device)
            head.tokens.copy_(order)
            labels, moments = local_moments(stats, weight)
            found = [
                quantize_rows(
                    Rows(weight, which),
                    bits,
                    head.group,
                    (labels[which], moments),
                    integers=head.integers,
                )
                for bits, which in zip(
                    (8, self.bits), order.tensor_split([self.frequent]), strict=True
                )
            ]
            head.store(*(torch.cat(part) for part in zip(*found, strict=True)))
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias if order is None else bias[order])


def quantize_rows(
    weight: Tensor | Rows,
    bits: int,
    group: int,
    metrics: tuple[Tensor, Tensor] | None,
    less: Callable[[Tensor], Tensor] | None = None,
    *,
    integers: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scales `(V, D / group)` and codes `(V, D)` of `weight (V, D)`; `metrics` as `local_moments` gives them.

    `less`: what is taken from some rows of `weight` before. `integers`: 0 is one of the levels.
    """
    vocab, dim = weight.shape
    device = weight.device
    last = torch.full((dim,), 2.0**bits - 1, device=device)
    middle = middle_code(bits, integers)
    scales = torch.empty(vocab, dim // group, device=device)
    codes = torch.empty(vocab, dim, dtype=torch.uint8, device=device)
    for moment, mine in rows_by_moment(weight, metrics, f"{bits} bits"):
        rows = weight[mine].float()
        rows = rows if less is None else rows - less(mine)
        scales[mine] = group_scales(rows, moment.diagonal().float(), bits, group, middle)
        step = scales[mine].repeat_interleave(group, 1)
        order = moment.diagonal().argsort(descending=True)
        found = round_with_feedback(rows, step, step * -middle, last, moment, order)
        if bits < 8:
            scales[mine] = refit_scales(rows, found.float() - middle, scales[mine], moment)
            step = scales[mine].repeat_interleave(group, 1)
            found = coordinate_descent(found, rows, step, step * -middle, last, moment, order)
        codes[mine] = found
    return scales, codes


def middle_code(bits: int, integers: bool) -> float:
    """The code, or the half between two, of a weight that is 0."""
    return (2.0**bits - 1 + integers) / 2


class QuantizedHead(KernelRowsHead):
    """`weight` holds the scales `(V, D / group)`, which train, at 8 bits at a rate of their own: see
    `training.rates.parameter_groups`. The codes are packed into bytes.

    With `frequent` tokens in 8 bits these have the first rows, `bytes (frequent, D)`, and `tokens (V,)` says whose each
    row is.

    `repair_head` trains the codes too. With one scale per row a kernel decodes from the packed codes. Codes of 8 bits,
    and all where no kernel may be used, are multiplied by torch's own oneDNN operator, which keeps a second copy of
    them in its own order, a byte each: faster than the kernel for 8 bits, fewer bits read no less.
    """

    kernel = "quantized"
    by_matrix_unit = 128
    code_lr = 1e-2

    def __init__(
        self,
        dim: int,
        vocab: int,
        bits: int,
        group: int,
        *,
        bias: bool,
        frequent: int = 0,
        integers: bool = False,
    ):
        super().__init__(dim, vocab, bias=bias)
        self.bits, self.group, self.frequent, self.integers = bits, group, frequent, integers
        self.weight = nn.Parameter(torch.empty(vocab, dim // group))
        for width in PARTS[bits]:
            shape = vocab - frequent, -(-dim * width // 8)
            self.register_buffer(f"codes{width}", torch.zeros(shape, dtype=torch.uint8))
        self.bytes: Tensor | None
        self.tokens: Tensor | None
        empty = torch.zeros(frequent, dim, dtype=torch.uint8) if frequent else None
        self.register_buffer("bytes", empty)
        order = torch.arange(vocab).to(index_dtype(vocab)) if frequent else None
        self.register_buffer("tokens", order)

    def index_limits(self) -> dict[str, int]:
        return {} if self.tokens is None else {"tokens": self.out_features}

    def token_of_row(self) -> Tensor | None:
        tokens = self.tokens
        return None if tokens is None else self._derived("order", tokens.long, tokens)

    def packed(self) -> list[Tensor]:
        return [getattr(self, f"codes{width}") for width in PARTS[self.bits]]

    def store(self, scales: Tensor, codes: Tensor) -> None:
        """Take over what `quantize_rows` found."""
        self.weight.copy_(scales)
        self.pack(codes)

    def unpacked(self) -> Tensor:
        codes = unpack_bits(self.packed(), self.bits, self.in_features)
        return codes if self.bytes is None else torch.cat([self.bytes, codes])

    def pack(self, codes: Tensor) -> None:
        if self.bytes is not None:
            self.bytes.copy_(codes[: self.frequent].clamp_max(255))
        codes = codes[self.frequent :]
        for which in blocks(len(codes)):
            part = codes[which].clamp_max(2**self.bits - 1).to(torch.uint8)
            for packed, new in zip(self.packed(), pack_bits(part, self.bits), strict=True):
                packed[which] = new

    def rows(self, which: slice | Tensor) -> Tensor:
        last = self._last(which)
        codes = (
            self._codes(which) if self.latent is None else round_through(self.latent[which], last)
        )
        scale = self.weight[which]
        centred = codes.to(scale.dtype) - (last + self.integers) / 2
        rows: Tensor = centred.view(len(scale), -1, self.group) * scale.unsqueeze(-1)
        return rows.flatten(1)

    def _last(self, which: slice | Tensor) -> Tensor | float:
        """The largest code that there can be, for all rows or for each of some, `(n, 1)`."""
        last = 2.0**self.bits - 1
        if self.bytes is None:
            return last
        places = torch.arange(self.out_features, device=self.bytes.device)[which]
        found = torch.where(places < self.frequent, 255.0, last)
        return found.to(self.weight.dtype).unsqueeze(1)

    def _codes(self, which: slice | Tensor) -> Tensor:
        """Codes of some rows, `(n, D)` uint8."""
        if self.bytes is None:
            return unpack_bits([p[which] for p in self.packed()], self.bits, self.in_features)
        places = torch.arange(self.out_features, device=self.bytes.device)[which]
        inside = places < self.frequent
        codes = self.bytes[places.clamp_max(self.frequent - 1)]
        parts = [p[places[~inside] - self.frequent] for p in self.packed()]
        codes[~inside] = unpack_bits(parts, self.bits, self.in_features)
        return codes

    def torch_operator(self) -> str | None:
        fits = self.group == self.in_features and self.weight.device.type in ("cpu", "meta")
        if not fits or why_no_int8() is not None:
            return None
        if self.bits == 8 or self.kernels == "off":
            return "oneDNN int8"
        return "oneDNN int8" if self.kernels == "auto" and self.why_no_kernel() else None

    def _scale(self) -> Tensor:
        return self._derived("scale", lambda: self.weight.detach().float(), self.weight)

    def compiled(self, hidden: Tensor) -> Tensor:
        scale = self._scale()
        if self.bytes is None:
            return self._products(hidden, self.packed(), self.bits, scale)
        first = self._products(hidden, [self.bytes], 8, scale[: self.frequent])
        rest = self._products(hidden, self.packed(), self.bits, scale[self.frequent :])
        places = self.row_of_token()
        assert places is not None
        return torch.cat([first, rest], 1).index_select(1, places)

    def unpacked_product(self, x: Tensor, start: int, stop: int) -> Tensor:
        rows = torch.empty(stop - start, self.in_features, dtype=x.dtype)
        cut = min(max(self.frequent, start), stop) - start
        scale, widths = self._scale(), PARTS[self.bits]
        if self.bytes is not None and cut:
            quantized_rows([self.bytes], (8,), scale, start, rows[:cut], middle=self._middle(8))
        if cut < len(rows):
            first = start + cut - self.frequent
            middle = self._middle(self.bits)
            scale = scale[self.frequent :]
            quantized_rows(self.packed(), widths, scale, first, rows[cut:], middle=middle)
        return F.linear(x, rows)

    def _middle(self, bits: int) -> float:
        return middle_code(bits, self.integers)

    def _products(self, hidden: Tensor, packed: list[Tensor], bits: int, scale: Tensor) -> Tensor:
        if not self.torch_operator():
            return quantized_scores(hidden, packed, PARTS[bits], scale, middle=self._middle(bits))

        def rows(which: slice) -> Tensor:
            return unpack_bits([p[which] for p in packed], bits, self.in_features)

        def in_bytes() -> list[Tensor]:
            return int8_packed(rows, len(scale), bits)

        name = "int8" if packed[0] is not self.bytes else "int8 of the frequent"
        codes = self._derived(name, in_bytes, *packed)
        return int8_scores(hidden, codes, scale.flatten(), integers=self.integers)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group}"
