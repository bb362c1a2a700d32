"""VQ-Logits: tokens share the codes of a small codebook, in its published form and repaired."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.heads.base import Head, HeadSpec, check_temperature, index_dtype
from hf_softheads.heads.metric import metric_root
from hf_softheads.kmeans import fill_empty, kmeans, nearest, require_finite, weighted_means

if TYPE_CHECKING:
    from hf_softheads.stats import HeadStats

_IPF_STEPS = 30
_IPF_ELEMENTS = 2**24  # states × codes used to fit the code marginals


@dataclass(frozen=True)
class VQ(HeadSpec, name="vq"):
    """`logit_v = weight[code(v)] · h + bias_v`: one row per code, gathered to the vocabulary (arXiv 2505.10202).

    The defaults are the published method: codes from k-means on the trained rows, no bias, a trainable codebook and
    a fixed map. Tokens of one code then share one logit, so perplexity cannot fall under `exp E[log n_code(y)]`,
    however the model is trained; `describe` prints that floor. The other fields repair this, each on its own, and
    all need `HeadStats`; `VQ.repaired(codes)` sets them together.

    Attributes:
        codes: size of the codebook, singletons included.
        init: token → code map: `kmeans` on the trained rows, or the published baselines `random` and `contiguous`;
            a code starts as the mean of its tokens' rows.
        bias: `none`; `prior`: `log(n_code π(token | code))` from the token counts, which leaves each code its mass;
            `fitted`: `log` of the dense model's mean probability within the code, plus an offset per code that gives
            each code the probability its tokens have under the dense model (iterative proportional fitting).
        singletons: how many of the most frequent tokens keep their own row as a code of its own.
        metric: `euclidean`, as published; `activation`: distances in `E[h hᵀ]` (in the covariance of h when there is
            a bias), each token weighted by its mean probability under the dense model.
        seed: of k-means and of the random map.
    """

    codes: int
    init: Literal["kmeans", "random", "contiguous"] = "kmeans"
    bias: Literal["none", "prior", "fitted"] = "none"
    singletons: int = 0
    metric: Literal["euclidean", "activation"] = "euclidean"
    seed: int = 0

    @classmethod
    def repaired(cls, codes: int, seed: int = 0) -> VQ:
        """Every repair that needs no training: activation metric, fitted bias, a quarter of the codes for one token."""
        return cls(codes, bias="fitted", singletons=codes // 4, metric="activation", seed=seed)

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls.repaired(vocab // part) for part in (64, 32, 16, 8, 4) if vocab > part]

    def check(self, dim: int, vocab: int) -> None:
        if not 1 <= self.codes < vocab:
            raise ValueError(
                f"vq asked for {self.codes} codes for {vocab} tokens; 1 to {vocab - 1} are possible"
            )
        if not 0 <= self.singletons < self.codes:
            raise ValueError(
                f"vq asked for {self.singletons} singleton codes of {self.codes}; "
                f"0 to {self.codes - 1} are possible, the rest of the tokens shares what is left"
            )

    @property
    def needs_stats(self) -> bool:
        return self.bias != "none" or self.singletons > 0 or self.metric != "euclidean"

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> VQHead:
        return VQHead(
            dim, vocab, self.codes, bias=bias or self.bias != "none", singletons=self.singletons
        )

    @torch.no_grad()
    def fit(
        self, head: VQHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        if self.needs_stats and stats is None:
            raise ValueError(
                f"{self} needs statistics of the model's hidden states; pass stats=sh.collect(model, batches)"
            )
        labels, row_weights = self._map(weight, stats)
        head.codes.copy_(labels)
        head.weight.copy_(weighted_means(weight, labels, self.codes, row_weights))
        if head.bias is not None:
            head.bias.copy_(self._bias(head, labels, bias, stats))
        head.measure_floor(stats)

    def _map(self, weight: Tensor, stats: HeadStats | None) -> tuple[Tensor, Tensor]:
        """Code of each token and its weight in the mean of the code, `(V,)` both."""
        vocab = len(weight)
        row_weights = torch.ones(vocab, device=weight.device)
        root = None
        if stats is not None and self.metric == "activation":
            row_weights = stats.mean_prob.to(weight.device)
            root = metric_root(stats, centred=self.bias != "none")[0]
        labels = torch.empty(vocab, dtype=torch.long, device=weight.device)
        shared = torch.arange(vocab, device=weight.device)
        if stats is not None and self.singletons:
            order = _frequencies(stats).argsort(descending=True).to(weight.device)
            labels[order[: self.singletons]] = torch.arange(self.singletons, device=weight.device)
            shared = order[self.singletons :].sort().values
        codes = self.codes - self.singletons
        if self.init == "kmeans":
            points = weight if not self.singletons else weight[shared]
            found = kmeans(
                points, codes, weights=row_weights[shared], metric=root, seed=self.seed
            ).labels
        elif self.init == "random":
            generator = torch.Generator().manual_seed(self.seed)
            found = torch.randint(codes, (len(shared),), generator=generator).to(weight.device)
        else:
            found = torch.arange(len(shared), device=weight.device) * codes // len(shared)
        labels[shared] = found + self.singletons
        return labels, row_weights

    def _bias(
        self, head: VQHead, labels: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> Tensor:
        if self.bias == "none" or stats is None:
            assert bias is not None  # the head has a bias only because the dense head had one
            return bias.float()
        prior = _frequencies(stats) if self.bias == "prior" else stats.mean_prob.double()
        prior = prior.to(labels.device)
        mass = prior.new_zeros(self.codes).index_add_(0, labels, prior)
        law = (prior / mass[labels]).log() / head.gain
        if self.bias == "fitted":
            law = law + _code_offsets(head, stats, mass.float())[labels]
        else:
            law = (
                law
                + (torch.bincount(labels, minlength=self.codes).double().log() / head.gain)[labels]
            )
        return law.float()


def _frequencies(stats: HeadStats) -> Tensor:
    """Token counts plus one token's worth of the dense model's mean probability, so that none is 0; `(V,)`."""
    return stats.token_counts.double() + stats.mean_prob.double()


def _code_offsets(head: VQHead, stats: HeadStats, mass: Tensor) -> Tensor:
    """`a` with `E_h[softmax(codebook · h + a)] = mass`, by iterative proportional fitting; `(C,)`."""
    count = max(256, _IPF_ELEMENTS // len(mass))
    states = stats.states[:count].to(mass.device)
    scores = F.linear(states, head.weight.float())  # (S, C)
    transform = head.transform or (lambda z: z)
    offsets = torch.zeros_like(mass)
    for _ in range(_IPF_STEPS):
        predicted = transform(scores + offsets).softmax(-1).mean(0)
        step = (mass.clamp_min(1e-20) / predicted.clamp_min(1e-20)).log()
        offsets += torch.where(mass > 0, step, 0) / head.gain
    return offsets


class _Groups(NamedTuple):
    """Lookup tables that follow from the token → code map."""

    code_of: Tensor  # code of each token, (V,) int32
    sizes: Tensor  # tokens of each code, (C,)
    starts: Tensor  # where a code's tokens begin in `tokens`, (C,)
    tokens: Tensor  # tokens by code, then by falling bias, (V,)


class VQHead(Head):
    """`scores`: `F.linear(h, weight)[..., codes] + bias`; everything else happens among the codes, not the tokens."""

    keep_in_fp32 = ("bias",)

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

    def scores(self, hidden: Tensor) -> Tensor:
        codes = F.linear(hidden, self.weight).float()
        flat = codes.view(-1, codes.shape[-1])  # index_select is fastest on rows, in fp32, by int32
        index = self._groups().code_of
        if flat.requires_grad:
            index = index.long()  # the backward's index_add_ is 15 times slower by int32
        full = flat.index_select(1, index)
        if self.bias is not None:
            full = full + self.bias
        return full.view(*codes.shape[:-1], self.out_features)

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if not self._factorises:
            return super().log_prob(hidden, labels)
        groups, mass = self._groups(), self._code_mass()

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
        mass = self._code_mass()
        return self._in_chunks(
            lambda h: (self._code_logits(h) + mass).logsumexp(-1),
            hidden,
            width=4 * len(self.weight),
        )

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        groups = self._groups()
        depth = min(k, int(self._derived("largest", lambda: int(groups.sizes.max()), self.codes)))
        breadth = min(k, len(self.weight))
        if not self._increases or depth * breadth > self.out_features:
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
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        check_temperature(temperature)
        if not self._factorises:
            return super().sample(hidden, temperature=temperature, generator=generator)
        groups, mass = self._groups(), self._code_mass(temperature)
        within = self._within(temperature)

        def chunk(h: Tensor) -> Tensor:
            codes = self._code_logits(h) / temperature + mass
            noise = torch.empty_like(codes).exponential_(generator=generator)
            code = (codes - noise.log_()).argmax(-1)  # Gumbel-max
            u = torch.rand(code.shape, generator=generator, device=h.device, dtype=torch.float64)
            first, last = groups.starts[code], groups.starts[code] + groups.sizes[code] - 1
            if within is None:
                place = first + (u * (last - first + 1)).long()
            else:
                before = torch.where(first > 0, within[first - 1], 0)
                place = torch.searchsorted(within, before + u * (within[last] - before), right=True)
            return groups.tokens[torch.minimum(torch.maximum(place, first), last)]

        return self._in_chunks(chunk, hidden, width=4 * len(self.weight))

    @torch.no_grad()
    def reassign(self, weight: Tensor, stats: HeadStats | None = None) -> int:
        """Move every token to the code nearest to its trained row `weight (V, D)`; how many moved.

        With `stats` distances are in the activation metric. A token's bias changes so that its mean logit stays;
        singleton codes and their tokens stay; a code left empty takes the token that fits its own code worst.
        """
        require_finite(weight, "output rows")
        groups = self._groups()
        old = groups.code_of.long()
        shared = (old >= self.singletons).nonzero().flatten()
        centers = self.weight[self.singletons :].float()
        root = None
        if stats is not None:
            stats.check(self.in_features, self.out_features)
            root = metric_root(stats, centred=self.bias is not None)[0].to(weight.device)
        labels, cost = nearest(weight[shared], centers, metric=root)
        before = labels.clone()
        fill_empty(labels, cost, len(centers))
        new = old.clone()
        new[shared] = labels + self.singletons
        refilled = shared[labels != before]
        self.weight[new[refilled]] = weight[refilled].to(self.weight.dtype)
        if self.bias is not None and stats is not None:
            mean = F.linear(stats.mean.to(self.weight), self.weight)
            self.bias.add_(mean[old] - mean[new])
        self.codes.copy_(new)
        return int((new != old).sum())

    @torch.no_grad()
    def measure_floor(self, stats: HeadStats | None) -> None:
        """Record the least mean loss that any codebook can reach on tokens as frequent as in `stats`."""
        if stats is None:
            self.floor.fill_(-1)
            return
        counts = stats.token_counts.to(self.codes.device).double()
        groups = self._groups()
        index = groups.code_of.long()
        losses = [groups.sizes.double().log()[index]]
        if self.bias is not None:
            scaled = self.bias.double() * self.gain
            losses.append(self._code_mass().double()[index] - scaled)
        for place, loss in enumerate(losses):
            self.floor[place] = round(1e6 * float((counts * loss).sum() / counts.sum()))

    @property
    def perplexity_floor(self) -> float | None:
        """The least perplexity that this map (with its bias as fitted) allows; None without statistics."""
        value = int(self.floor[0 if self.bias is None else 1])
        return None if value < 0 else math.exp(value / 1e6)

    def code_table(self) -> tuple[Tensor, int]:
        return self.codes.long()[:, None], len(self.weight)

    def notes(self) -> list[str]:
        sizes = self._groups().sizes
        lines = [
            f"{int((sizes == 1).sum())} of {len(sizes)} codes hold one token, the largest {int(sizes.max())}"
        ]
        uniform, biased = (self.floor.double() / 1e6).exp().tolist()
        if self.floor[0] >= 0:
            lines.append(f"perplexity floor of the map, equal logits within a code: {uniform:.2f}")
        else:
            even = float(sizes[self._groups().code_of.long()].double().log().mean().exp())
            lines.append(
                f"perplexity floor of the map if all tokens were equally frequent: {even:.2f} "
                "(patch with stats=… for that of real text)"
            )
        if self.floor[1] >= 0:
            lines.append(f"perplexity floor of the map with its bias as fitted: {biased:.2f}")
        return lines

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
    def _increases(self) -> bool:
        return all(step == "tanh" or value > 0 for step, value in self._known_transform().steps)

    @property
    def _biases(self) -> tuple[Tensor, ...]:
        return () if self.bias is None else (self.bias,)

    def _code_logits(self, hidden: Tensor) -> Tensor:
        return self._known_transform()(F.linear(hidden, self.weight).float())

    def _groups(self) -> _Groups:
        return self._derived("groups", self._build_groups, self.codes, *self._biases)

    @torch.no_grad()
    def _build_groups(self) -> _Groups:
        index = self.codes.long()
        sizes = torch.bincount(index, minlength=len(self.weight))
        if self.bias is None:
            tokens = index.argsort(stable=True)
        else:
            tokens = self.bias.float().argsort(descending=True, stable=True)
            tokens = tokens[index[tokens].argsort(stable=True)]
        return _Groups(index.int(), sizes, sizes.cumsum(0) - sizes, tokens)

    def _peaks(self) -> Tensor:
        """Largest bias of each code, `(C,)`; -inf where it has no token."""
        groups = self._groups()
        if self.bias is None:
            peak = torch.zeros_like(groups.sizes, dtype=torch.float32)
        else:
            peak = self.bias.detach().float()[
                groups.tokens[groups.starts.clamp_max(self.out_features - 1)]
            ]
        return peak.masked_fill(groups.sizes == 0, -torch.inf)

    def _code_mass(self, temperature: float = 1.0) -> Tensor:
        """`log Σ_{v in code} exp(bias_v · scale / temperature)`, `(C,)` fp32; differentiable in the bias."""
        if self.bias is None:
            return self._derived("sizes", lambda: self._groups().sizes.float().log(), self.codes)
        bias, gain = self.bias, self.gain

        def build() -> Tensor:
            index = self._groups().code_of.long()
            values = bias.float() * (gain / temperature)
            peak = self._peaks() * (gain / temperature)
            safe = peak.masked_fill(peak.isinf(), 0)
            total = torch.zeros_like(safe).index_add(0, index, (values - safe[index]).exp())
            return safe + total.log()

        if torch.is_grad_enabled() and bias.requires_grad:
            return build()
        return self._derived("mass", build, self.codes, bias, constants=gain / temperature)

    def _within(self, temperature: float) -> Tensor | None:
        """Running sum of `p(token | code)` in the order of `tokens`, `(V,)` fp64; None if it is uniform."""
        if self.bias is None:
            return None
        bias, factor = self.bias, self.gain / temperature

        def build() -> Tensor:
            groups = self._groups()
            code = groups.code_of[groups.tokens].long()
            mass = self._code_mass(temperature).double()
            return (bias[groups.tokens].double() * factor - mass[code]).exp().cumsum(0)

        return self._derived("within", build, self.codes, bias, constants=factor)
