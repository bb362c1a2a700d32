"""The module of a VQ head: everything happens among the codes, not the tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import Head
from hf_softheads.heads.forms.largest import by_two_passes
from hf_softheads.heads.forms.sampling import check_temperature, gumbel_max
from hf_softheads.heads.forms.token_rows import RowKind


class Groups(NamedTuple):
    """Lookup tables that follow from the token → code map."""

    code_of: Tensor  # code of each token, (V,) int32
    sizes: Tensor  # tokens of each code, (C,)
    starts: Tensor  # where a code's tokens begin in `tokens`, (C,)
    tokens: Tensor  # tokens by code, then by falling bias, (V,)


class VQHead(Head):
    """`scores`: `F.linear(h, weight)[..., codes] + bias`; everything else happens among the codes, not the tokens."""

    keep_in_fp32 = ("bias",)
    row_kind: RowKind = "shared"

    def __init__(self, dim: int, vocab: int, codes: int, *, bias: bool, singletons: int = 0):
        super().__init__(dim, vocab)
        self.singletons = singletons
        self.weight = nn.Parameter(torch.empty(codes, dim))
        self.bias = nn.Parameter(torch.empty(vocab)) if bias else None
        self.codes: Tensor
        self.floor: Tensor
        self.register_buffer("codes", torch.zeros(vocab, dtype=index_dtype(codes)))
        # floors of the mean loss in millionths of a nat, without and with bias; integers survive a cast to bf16
        self.register_buffer("floor", torch.full((2,), -1, dtype=torch.int32))

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(self.codes[tokens].long(), self.weight).float()

    def scores(self, hidden: Tensor) -> Tensor:
        codes = F.linear(hidden, self.weight).float()
        flat = codes.view(-1, codes.shape[-1])  # index_select is fastest on rows, in fp32, by int32
        index = self.groups().code_of
        if flat.requires_grad:
            index = index.long()  # the backward's index_add_ is 15 times slower by int32
        full = flat.index_select(1, index)
        if self.bias is not None:
            full = full + self.bias
        return full.view(*codes.shape[:-1], self.out_features)

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if not self._factorises:
            return super().log_prob(hidden, labels)
        groups, mass = self.groups(), self.code_mass()

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            codes = self._code_logits(h)
            picked = codes.gather(-1, groups.code_of[y].long().unsqueeze(-1)).squeeze(-1)
            if self.bias is not None:
                picked = picked + self.bias[y].float() * self.gain
            return picked - (codes + mass).logsumexp(-1)

        return self._in_chunks(chunk, hidden, labels, width=4 * len(self.weight))

    def logsumexp(self, hidden: Tensor) -> Tensor:
        if not self._factorises:
            return super().logsumexp(hidden)
        mass = self.code_mass()
        return self._in_chunks(
            lambda h: (self._code_logits(h) + mass).logsumexp(-1),
            hidden,
            width=4 * len(self.weight),
        )

    def token_numbers(
        self, hidden: Tensor, labels: Tensor, temperature: float, moments: bool
    ) -> Tensor:
        if not (self._factorises and self._known_transform().rises):
            return super().token_numbers(hidden, labels, temperature, moments)
        groups, mass = self.groups(), self.code_mass(temperature)
        shift, own = (
            self._shifts(temperature),
            self._derived("peak", self._peaks, self.codes, *self._biases),
        )
        squares = self.code_mass(temperature / 2) if moments else mass

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            raw = F.linear(h, self.weight).float()
            z = self._known_transform()(raw) / temperature
            total = (z + mass).logsumexp(-1, keepdim=True)
            share = (z + mass - total).exp()  # p(code), 0 for one without tokens
            picked = z.gather(-1, groups.code_of[y].long().unsqueeze(-1)).squeeze(-1)
            surprise = total - z
            if shift is not None:
                picked = picked + shift[0][y]
                surprise = surprise - shift[1]
            best = groups.tokens[groups.starts[(raw.detach() + own).argmax(-1)]]
            found = [picked - total.squeeze(-1), (share * surprise).sum(-1), best.to(z.dtype)]
            if moments:
                flat, count = z.detach(), self.out_features
                mean = (flat * (groups.sizes / count)).sum(-1)
                mean = mean if shift is None else mean + shift[0].detach().mean()
                twice = (2 * flat + squares.detach()).logsumexp(-1)
                found += [mean, twice - 2 * total.detach().squeeze(-1)]
            return torch.stack(found, -1)

        return self._in_chunks(chunk, hidden, labels, width=6 * len(self.weight))

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        groups = self.groups()
        depth = min(k, int(self._derived("largest", lambda: int(groups.sizes.max()), self.codes)))
        breadth = min(k, len(self.weight))
        if not self._known_transform().rises or depth * breadth > self.out_features:
            return super().topk(hidden, k)
        # The k best tokens are among the k best of each of the k codes whose best token is best.
        codes = F.linear(hidden, self.weight).float()
        best = codes + self._derived("peak", self._peaks, self.codes, *self._biases)
        chosen = best.topk(breadth, -1).indices  # (…, breadth)
        if depth == 1:
            tokens = groups.tokens[groups.starts[chosen]]
            values = best.gather(-1, chosen)
        else:
            rank = torch.arange(depth, device=hidden.device)
            place = (groups.starts[chosen].unsqueeze(-1) + rank).clamp_max(self.out_features - 1)
            tokens = groups.tokens[place]  # (…, breadth, depth)
            values = codes.gather(-1, chosen).unsqueeze(-1).expand(tokens.shape)
            if self.bias is not None:
                values = values + self.bias[tokens]
            values = values.masked_fill(rank >= groups.sizes[chosen].unsqueeze(-1), -torch.inf)
            tokens, values = tokens.flatten(-2), values.flatten(-2)
        values, order = self._known_transform()(values).topk(k, -1)
        return values, tokens.gather(-1, order)

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._factorises:
            return super().topk_logsumexp(hidden, k, temperature)
        return by_two_passes(self, hidden, k, temperature)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        check_temperature(temperature)
        if not self._factorises:
            return super().sample(hidden, temperature=temperature, generator=generator)
        groups, mass = self.groups(), self.code_mass(temperature)
        within = self._within(temperature)

        def chunk(h: Tensor) -> Tensor:
            code = gumbel_max(self._code_logits(h) / temperature + mass, generator)
            u = torch.rand(code.shape, generator=generator, device=h.device, dtype=torch.float64)
            first, last = groups.starts[code], groups.starts[code] + groups.sizes[code] - 1
            if within is None:
                place = first + (u * (last - first + 1)).long()
            else:
                before = torch.where(first > 0, within[first - 1], 0)
                place = torch.searchsorted(within, before + u * (within[last] - before), right=True)
            return groups.tokens[torch.minimum(torch.maximum(place, first), last)]

        return self._in_chunks(chunk, hidden, width=4 * len(self.weight))

    def resize(self, vocab: int) -> VQHead:
        """Codes are kept; new tokens join the code nearest to the mean row, with the mean bias. Forgets the floor."""
        old = self.codes.long()
        new = type(self)(
            self.in_features,
            vocab,
            len(self.weight),
            bias=self.bias is not None,
            singletons=self.singletons,
        ).to(self.weight)
        new.transform = self.transform
        kept = min(vocab, self.out_features)
        with torch.no_grad():
            new.weight.copy_(self.weight)
            rows = self.weight.float()
            mean = rows[old].mean(0, keepdim=True)
            shared = rows[self.singletons :]
            new.codes.fill_(int(torch.cdist(mean, shared).argmin()) + self.singletons)
            new.codes[:kept] = self.codes[:kept]
            if self.bias is not None and new.bias is not None:
                new.bias.data = new.bias.data.to(self.bias.dtype)
                new.bias.fill_(float(self.bias.mean()))
                new.bias[:kept] = self.bias[:kept]
        return new

    @property
    def perplexity_floor(self) -> float | None:
        """The least perplexity that this map (with its bias as fitted) allows; None without statistics."""
        value = int(self.floor[0 if self.bias is None else 1])
        return None if value < 0 else math.exp(value / 1e6)

    def index_limits(self) -> dict[str, int]:
        return {"codes": len(self.weight)}

    def code_table(self) -> tuple[Tensor, int]:
        return self.codes.long()[:, None], len(self.weight)

    def notes(self) -> list[str]:
        sizes = self.groups().sizes
        lines = [
            f"{int((sizes == 1).sum())} of {len(sizes)} codes hold one token, the largest {int(sizes.max())}"
        ]
        return lines + self._floor_notes()

    def _floor_notes(self) -> list[str]:
        uniform, biased = (self.floor.double() / 1e6).exp().tolist()
        found = []
        if self.floor[0] >= 0:
            found.append(f"perplexity floor of the map, equal logits within a code: {uniform:.2f}")
        else:
            groups = self.groups()
            even = float(groups.sizes[groups.code_of.long()].double().log().mean().exp())
            found.append(
                f"perplexity floor of the map if all tokens were equally frequent: {even:.2f} "
                "(patch with stats=… for that of real text)"
            )
        if self.floor[1] >= 0:
            found.append(f"perplexity floor of the map with its bias as fitted: {biased:.2f}")
        return found

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel()

    @property
    def gain(self) -> float:
        """Slope of the family's logit transform at 0."""
        steps = self.transform.steps if self.transform else ()
        gain = 1.0
        for operation, value in steps:
            gain *= {"div": 1 / value, "mul": value}.get(operation, 1.0)
        return gain

    @property
    def _factorises(self) -> bool:
        """Whether `p(token | h) = p(code | h) p(token | code)`: not with a bias under a tanh."""
        return self.bias is None or self._known_transform().scale is not None

    @property
    def _biases(self) -> tuple[Tensor, ...]:
        return () if self.bias is None else (self.bias,)

    def _code_logits(self, hidden: Tensor) -> Tensor:
        return self._known_transform()(F.linear(hidden, self.weight).float())

    def groups(self) -> Groups:
        return self._derived("groups", self._build_groups, self.codes, *self._biases)

    @torch.no_grad()
    def _build_groups(self) -> Groups:
        index = self.codes.long()
        sizes = torch.bincount(index, minlength=len(self.weight))
        if self.bias is None:
            tokens = index.argsort(stable=True)
        else:
            tokens = self.bias.float().argsort(descending=True, stable=True)
            tokens = tokens[index[tokens].argsort(stable=True)]
        return Groups(index.int(), sizes, sizes.cumsum(0) - sizes, tokens)

    def _peaks(self) -> Tensor:
        """Largest bias of each code, `(C,)`; -inf where it has no token."""
        groups = self.groups()
        if self.bias is None:
            peak = torch.zeros_like(groups.sizes, dtype=torch.float32)
        else:
            peak = self.bias.detach().float()[
                groups.tokens[groups.starts.clamp_max(self.out_features - 1)]
            ]
        return peak.masked_fill(groups.sizes == 0, -torch.inf)

    def code_mass(self, temperature: float = 1.0) -> Tensor:
        """`log Σ_{v in code} exp(bias_v · scale / temperature)`, `(C,)` fp32; differentiable in the bias."""
        if self.bias is None:
            return self._derived("sizes", lambda: self.groups().sizes.float().log(), self.codes)
        bias, gain = self.bias, self.gain

        def build() -> Tensor:
            index = self.groups().code_of.long()
            values = bias.float() * (gain / temperature)
            peak = self._peaks() * (gain / temperature)
            safe = peak.masked_fill(peak.isinf(), 0)
            total = torch.zeros_like(safe).index_add(0, index, (values - safe[index]).exp())
            return safe + total.log()

        if torch.is_grad_enabled() and bias.requires_grad:
            return build()
        return self._derived("mass", build, self.codes, bias, constants=gain / temperature)

    def _shifts(self, temperature: float) -> tuple[Tensor, Tensor] | None:
        """Bias of each token in the logits `(V,)`, and its mean over `p(token | code)`, `(C,)`; None without bias."""
        if self.bias is None:
            return None
        index = self.groups().code_of.long()
        shift = self.bias.float() * (self.gain / temperature)
        within = (shift - self.code_mass(temperature)[index]).exp()
        mean = shift.new_zeros(len(self.weight)).index_add(0, index, within * shift)
        return shift, mean

    def _within(self, temperature: float) -> Tensor | None:
        """Running sum of `p(token | code)` in the order of `tokens`, `(V,)` fp64; None if it is uniform."""
        if self.bias is None:
            return None
        bias, factor = self.bias, self.gain / temperature

        def build() -> Tensor:
            groups = self.groups()
            code = groups.code_of[groups.tokens].long()
            mass = self.code_mass(temperature).double()
            return (bias[groups.tokens].double() * factor - mass[code]).exp().cumsum(0)

        return self._derived("within", build, self.codes, bias, constants=factor)
