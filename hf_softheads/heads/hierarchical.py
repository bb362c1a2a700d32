"""Class-factored softmax, converted from a trained dense head."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import blocks, over_states, progress, scores_of
from hf_softheads.heads.fit.hessian import metric_root
from hf_softheads.heads.fit.kmeans import kmeans, require_finite, weighted_means
from hf_softheads.heads.forms.largest import by_two_passes
from hf_softheads.heads.forms.sampling import gumbel_max
from hf_softheads.heads.forms.wrapper import WrapperHead, WrapperSpec
from hf_softheads.registry import Count, CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_STATES = 16_384  # hidden states that the class rows are fitted to
_STEPS, _HISTORY = 40, 10  # of L-BFGS
_BATCH = 2048  # hidden states at once
_RIDGE = 1e-3  # pull of the class rows towards their start, in the metric of the states
_SEARCHED = 4  # up to so many hidden states are searched class by class for their best tokens


@dataclass(frozen=True)
class Hierarchical(WrapperSpec, name="hierarchical"):
    """`p(v | h) = p(c | h) p(v | c, h)`: a softmax over classes, then the inner head's within the token's class.

    Source: Goodman 2001, arXiv cs/0108006; Morin & Bengio 2005. A training step or an exact sample reads the class
    rows and the rows of one class, about `2 √V` of V with `classes ≈ √V`.

    Converted, not trained: classes are k-means clusters of the trained rows, `p(v | c, h)` is that of the trained
    rows themselves, so what is lost is lost in `p(c | h)`. A class's exact logit is the `log Σ exp` of its tokens';
    its row starts as the tangent of that at the class's mean hidden state, and with `HeadStats` all of them are
    then fitted together to the dense head's class probabilities, a convex problem. Without statistics the tangent
    is at 0: the mean row, and the log of the class's size. A class of one token is exact.

    Attributes:
        classes: how many; with V the head is the dense one.
        seed: of k-means.
    """

    classes: Count
    seed: CountOrZero = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(round(vocab**0.5))]

    @classmethod
    def lossless(cls, dim: int, vocab: int) -> HeadSpec:
        return cls(vocab)

    def check(self, dim: int, vocab: int) -> None:
        if self.classes > vocab:
            raise ValueError(
                f"hierarchical asked for {self.classes} classes of {vocab} tokens; 1 to {vocab} are possible, "
                f"{round(vocab**0.5)} reads the least"
            )
        super().check(dim, vocab)

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> HierarchicalHead:
        inner = self.inner.module(dim, vocab, bias=bias)
        return HierarchicalHead(dim, vocab, self.classes, inner)

    @torch.no_grad()
    def fit(
        self, head: HierarchicalHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        require_finite(weight, "output rows")
        vocab = len(weight)
        mass = torch.ones(vocab, device=weight.device)
        root = None
        if stats is not None:
            mass = stats.mean_prob.to(weight.device)
            root = metric_root(stats, centred=True)[0]
        if self.classes == vocab:
            labels = torch.arange(vocab, device=weight.device)
        else:
            labels = kmeans(weight, self.classes, weights=mass, metric=root, seed=self.seed).labels
        head.codes.copy_(labels)
        centers = torch.zeros(self.classes, weight.shape[1], device=weight.device)
        if stats is not None:
            where = stats.prob_weighted_mean.to(weight.device)
            centers = weighted_means(where, labels, self.classes, mass)
        rows, shifts = _tangents(weight, bias, labels, centers, head.logit_scale)
        states = 0
        if stats is not None and 1 < self.classes < vocab:
            h = stats.states[:_STATES].to(weight.device)
            rows, shifts = _refine(rows, shifts, weight, bias, labels, h, head.logit_scale)
            states = len(h)
        head.weight.copy_(rows)
        head.shift.copy_(shifts)
        head.states.fill_(states)
        head.inner.transform = head.transform
        super().fit(head, weight, bias, stats)


def _tangents(
    weight: Tensor, bias: Tensor | None, labels: Tensor, centers: Tensor, gain: float
) -> tuple[Tensor, Tensor]:
    """Row and shift of the tangent of `log Σ_{v in class} exp(gain · z_v) / gain` at each class's center."""
    parts = list(blocks(len(weight)))
    z = torch.empty(len(weight), device=weight.device)
    for part in parts:
        z[part] = (weight[part].float() * centers[labels[part]]).sum(-1)
    z = gain * (z if bias is None else z + bias)
    total = within_classes(z, labels, len(centers))
    share = (z - total[labels]).exp()
    rows = torch.zeros_like(centers)
    for part in parts:
        rows.index_add_(0, labels[part], weight[part].float() * share[part, None])
    return rows, total / gain - (rows * centers).sum(-1)


def _refine(
    rows: Tensor,
    shifts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    states: Tensor,
    gain: float,
) -> tuple[Tensor, Tensor]:
    """Class rows that minimise `E KL(dense p(class | h) ‖ softmax)` on some hidden states, from the given ones."""
    classes = len(rows)

    def shares(h: Tensor) -> Tensor:
        return within_classes(gain * scores_of(h, weight, bias), labels, classes).softmax(-1)

    wanted = over_states(shares, states, len(weight), "classes")
    moment = states.T @ states / len(states)
    start = rows.clone()
    rows, shifts = rows.clone().requires_grad_(), shifts.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [rows, shifts], max_iter=_STEPS, history_size=_HISTORY, line_search_fn="strong_wolfe"
    )

    bar = iter(progress(range(_STEPS * 5 // 4), "class rows"))  # calls in all of L-BFGS, at most

    def closure() -> Tensor:
        next(bar, None)
        optimizer.zero_grad()
        moved = rows - start
        loss = _RIDGE * ((moved @ moment) * moved).sum()
        loss.backward()
        total = loss.detach()
        for h, p in zip(states.split(_BATCH), wanted.split(_BATCH), strict=True):
            log_q = (gain * F.linear(h, rows, shifts)).log_softmax(-1)
            loss = -(p * log_q).sum() / len(states)
            loss.backward()
            total += loss.detach()
        return total

    with torch.enable_grad():
        optimizer.step(closure)
    return rows.detach(), shifts.detach()


def within_classes(z: Tensor, labels: Tensor, classes: int) -> Tensor:
    """`log Σ_{v: labels_v = c} exp z_v`, `(…, V)` → `(…, C)`; -inf for a class without tokens."""
    index = labels.expand(z.shape)
    top = z.detach().new_full((*z.shape[:-1], classes), -torch.inf)
    top = top.scatter_reduce(-1, index, z.detach(), "amax").clamp_min(torch.finfo(z.dtype).min)
    total = torch.zeros_like(top).index_add(-1, labels, (z - top.gather(-1, index)).exp())
    return top + total.log()


class HierarchicalHead(WrapperHead):
    """`weight (C, D)` and `shift (C,)` score the classes; `codes (V,)` says which class a token is in."""

    def __init__(self, dim: int, vocab: int, classes: int, inner: Head):
        super().__init__(dim, vocab, inner, ("shift",))
        self.weight = nn.Parameter(torch.empty(classes, dim))
        self.shift = nn.Parameter(torch.empty(classes))
        self.codes: Tensor
        self.states: Tensor
        self.register_buffer("codes", torch.zeros(vocab, dtype=index_dtype(classes)))
        self.register_buffer("states", torch.zeros(1, dtype=torch.int32))  # fitted to so many

    def scores(self, hidden: Tensor) -> Tensor:
        labels = self._derived("labels", lambda: self.codes.long(), self.codes)
        z = self.inner.scores(hidden).float()
        mass = within_classes(self.logit_scale * z, labels, len(self.weight)) / self.logit_scale
        return z + (self.classes(hidden) - mass).index_select(-1, labels)

    def classes(self, hidden: Tensor) -> Tensor:
        """Scores of the classes, `(…, C)` fp32."""
        return F.linear(hidden, self.weight).float() + self.shift

    def log_prob(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self._known_transform().scale is None:
            return super().log_prob(hidden, labels)
        code_of, place_of, *_ = self._members()

        def chunk(h: Tensor, y: Tensor) -> Tensor:
            codes = code_of[y]
            out = (
                (self.logit_scale * self.classes(h))
                .log_softmax(-1)
                .gather(-1, codes[:, None])
                .squeeze(-1)
            )
            for code in codes.unique().tolist():
                mine = (codes == code).nonzero().flatten()
                inside = self.inside(h[mine], code).log_softmax(-1)
                value = inside.gather(-1, place_of[y[mine]][:, None]).squeeze(-1)
                out = out.index_add(0, mine, value)
            return out

        return self._in_chunks(chunk, hidden, labels, width=self._width)

    def inside(self, hidden: Tensor, code: int) -> Tensor:
        """Logits of one class's tokens under the inner head, `(…, n)` fp32."""
        return self.logit_scale * self.inner.subset(hidden, self.tokens(code))

    def tokens(self, code: int) -> Tensor:
        """The tokens of a class, `(n,)`."""
        _, _, order, edges = self._members()
        return order[edges[code] : edges[code + 1]]

    def logsumexp(self, hidden: Tensor) -> Tensor:
        if self._known_transform().scale is None:
            return super().logsumexp(hidden)
        return (self.logit_scale * self.classes(hidden)).logsumexp(-1)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scale = self._known_transform().scale
        count = hidden.shape[:-1].numel()
        if scale is None or scale <= 0 or not 1 <= count <= _SEARCHED:
            return super().topk(hidden, k)
        found = [self._search(h, k) for h in hidden.reshape(count, -1)]
        values, tokens = (
            torch.stack(part).reshape(*hidden.shape[:-1], k) for part in zip(*found, strict=True)
        )
        return values, tokens

    def _search(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best tokens of one hidden state: no token's logit exceeds its class's, so few classes are read."""
        bounds, codes = (self.logit_scale * self.classes(hidden)).sort(descending=True)
        values = bounds.new_empty(0)
        tokens = codes.new_empty(0)
        for bound, code in zip(bounds.tolist(), codes.tolist(), strict=True):
            if len(values) == k and bound <= float(values[-1]):
                break
            fresh = self.inside(hidden, code).log_softmax(-1) + bound
            values, tokens = torch.cat([values, fresh]), torch.cat([tokens, self.tokens(code)])
            values, kept = values.topk(min(k, len(values)))
            tokens = tokens[kept]
        return values, tokens

    @torch.no_grad()
    def topk_logsumexp(
        self, hidden: Tensor, k: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        if temperature != 1.0 or self._known_transform().scale is None:
            return super().topk_logsumexp(hidden, k, temperature)
        return by_two_passes(self, hidden, k, temperature)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        if temperature != 1.0 or self._known_transform().scale is None:
            return super().sample(hidden, temperature=temperature, generator=generator)

        def chunk(h: Tensor) -> Tensor:
            codes = gumbel_max(self.logit_scale * self.classes(h), generator)
            tokens = torch.empty_like(codes)
            for code in codes.unique().tolist():
                mine = (codes == code).nonzero().flatten()
                tokens[mine] = self.tokens(code)[gumbel_max(self.inside(h[mine], code), generator)]
            return tokens

        return self._in_chunks(chunk, hidden, width=self._width)

    def _members(self) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Class of each token, its place in the class, the tokens by class, and where each class begins."""

        def build() -> tuple[Tensor, Tensor, Tensor, list[int]]:
            codes = self.codes.long()
            order = codes.argsort(stable=True)
            sizes = torch.bincount(codes, minlength=len(self.weight))
            starts = sizes.cumsum(0) - sizes
            places = order.argsort() - starts[codes]
            return codes, places, order, [*starts.tolist(), len(codes)]

        return self._derived("members", build, self.codes)

    @property
    def _width(self) -> int:
        edges = self._members()[3]
        largest = max(stop - start for start, stop in pairwise(edges))
        return len(self.weight) + largest

    def index_limits(self) -> dict[str, int]:
        return {"codes": len(self.weight)}

    def code_table(self) -> tuple[Tensor, int]:
        return self.codes.long()[:, None], len(self.weight)

    def notes(self) -> list[str]:
        sizes = torch.bincount(self.codes.long(), minlength=len(self.weight))
        how = (
            f"class rows fitted to {int(self.states)} hidden states"
            if int(self.states)
            else "class rows are mean rows, there were no statistics to fit them to (patch with stats=…)"
        )
        return [
            f"{len(sizes)} classes, the largest of {int(sizes.max())} tokens; {how}",
            *super().notes(),
        ]
