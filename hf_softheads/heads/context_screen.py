"""Clusters of contexts, each with the tokens that are likely there: the learned screen of L2S."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads.bitpack import index_dtype
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.fit.blockwise import gumbel_choice, over_states, scores_of
from hf_softheads.heads.fit.kmeans import kmeans, require_finite
from hf_softheads.registry import Count, CountOrZero

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_LIKELY = 128  # tokens of each hidden state whose probabilities are kept one by one
_SMOOTHING = 8.0  # hidden states' worth of the mean distribution in each cluster
_SHARPNESS = 10.0  # length of the cluster rows when their training starts
_ROUNDS, _STEPS, _BATCH, _LR = 4, 100, 1024, 0.03
_HEATS = (1.0, 0.1)


@dataclass(frozen=True)
class ContextScreen(HeadSpec, name="context_screen"):
    """`t = argmax_t weight_t · h`; `z_v = log p(v | t)` for the `tokens` likeliest of cluster t, `log π_v + c_t` else.

    L2S (arXiv 1810.12406): clusters of contexts, not of tokens. Rows start from spherical k-means of hidden states and
    are trained, in turn with the sets, by straight-through Gumbel-softmax to lower the cross-entropy of the dense
    distribution and its cluster's. Here all sets have one size, since `screened` scores a fixed number, and know their
    tokens' probabilities; no row of the matrix is stored: `Screened(ContextScreen(64), 256)` is the method, with a
    graded tail in place of -inf. An estimate of the dense `log Σ exp`, linear in h within a cluster, is added to all
    scores: it changes nothing here, but makes them comparable with exact logits.

    Needs `HeadStats`. `coverage` says how often the dense head's greedy token is in the set, on hidden states that were
    left out. It reads little and misses much, the more the larger the vocabulary.

    Attributes:
        clusters: of contexts, at most the hidden states in the statistics, best a hundredth of them.
        tokens: candidates of each cluster; `candidates` of the `screened` around it should be as many.
        seed: of k-means and of the noise.
    """

    clusters: Count
    tokens: Count = 256
    seed: CountOrZero = 0

    @classmethod
    def ladder(cls, dim: int, vocab: int) -> list[HeadSpec]:
        return [cls(clusters, max(1, vocab // 2)) for clusters in (2, 8, 32)]

    def check(self, dim: int, vocab: int) -> None:
        if self.tokens > vocab:
            raise ValueError(
                f"context_screen asked for clusters of {self.tokens} tokens; 1 to {vocab} are possible"
            )

    def module(self, dim: int, vocab: int, *, bias: bool = False) -> ContextScreenHead:
        return ContextScreenHead(dim, vocab, self.clusters, self.tokens)

    @torch.no_grad()
    def fit(
        self, head: ContextScreenHead, weight: Tensor, bias: Tensor | None, stats: HeadStats | None
    ) -> None:
        if stats is None:
            raise ValueError(f"{self} needs hidden states; pass stats=sh.collect(model, batches)")
        held = len(stats.states) // 8
        if self.clusters > len(stats.states) - held:
            raise ValueError(
                f"context_screen asked for {self.clusters} clusters, the statistics hold {len(stats.states)} hidden "
                f"states of which {len(stats.states) - held} can be clustered; ask for fewer clusters, or collect more"
            )
        require_finite(weight, "output rows")
        states = stats.states.to(weight.device)
        prior = stats.mean_prob.to(weight.device).double()
        prior = (prior / prior.sum()).log().float()
        seen = _look(head, states, weight, bias, prior)
        fitted, fresh = seen.part(slice(held, None)), seen.part(slice(held))
        start = kmeans(F.normalize(states[held:], dim=-1), self.clusters, seed=self.seed).centers
        rows = F.normalize(start, dim=-1) * _SHARPNESS
        trained = _train(rows, fitted, prior, self.tokens, self.seed)
        best = [_judge(rows, fitted, fresh, prior, self.tokens) for rows in (rows, trained)]
        rows = rows if held and best[0] <= best[1] else trained
        clusters = _sets(rows, fitted, prior, self.tokens)
        scale = head.logit_scale
        head.weight.copy_(rows)
        head.ids.copy_(clusters.ids)
        head.values.copy_(clusters.values / scale)
        head.floor.copy_(clusters.floor / scale)
        head.prior.copy_(prior / scale)
        which = _nearest(rows, seen)
        slope, level = _levels(states, seen.total, which, self.clusters)
        head.slope.copy_(slope / scale)
        head.level.copy_(level / scale)
        inside = torch.zeros(self.clusters, len(weight), dtype=torch.bool, device=weight.device)
        found = inside.scatter_(1, clusters.ids, True)[which, seen.ids[:, 0]]
        head.millionths.fill_(round(1e6 * float(found[:held].double().mean())) if held else -1)


class ContextScreenHead(Head):
    """`weight (r, D)`, `values (r, n)` and `ids (r, n)` of the sets, `floor (r,)` and `prior (V,)` for other tokens.

    The level that is added to all scores is `level (r,)` of the cluster and `slope (D,) · h`.
    """

    keep_in_fp32 = ("level", "slope")

    def __init__(self, dim: int, vocab: int, clusters: int, tokens: int):
        super().__init__(dim, vocab)
        self.weight = nn.Parameter(torch.empty(clusters, dim))
        self.values = nn.Parameter(torch.empty(clusters, tokens))
        self.floor = nn.Parameter(torch.empty(clusters))
        self.prior = nn.Parameter(torch.empty(vocab))
        self.ids: Tensor
        self.level: Tensor
        self.slope: Tensor
        self.millionths: Tensor
        self.register_buffer("ids", torch.zeros(clusters, tokens, dtype=index_dtype(vocab)))
        self.register_buffer("level", torch.zeros(clusters))
        self.register_buffer("slope", torch.zeros(dim))
        self.register_buffer("millionths", torch.full((1,), -1, dtype=torch.int32))

    def index_limits(self) -> dict[str, int]:
        return {"ids": self.out_features}

    @property
    def coverage(self) -> float | None:
        """How often the dense head's greedy token is in its state's set, on hidden states that were left out."""
        return None if int(self.millionths) < 0 else int(self.millionths) / 1e6

    def cluster(self, hidden: Tensor) -> Tensor:
        """Cluster of each hidden state, `(…)` int64."""
        return F.linear(hidden, self.weight).argmax(-1)

    def scores(self, hidden: Tensor) -> Tensor:
        which = self.cluster(hidden)
        level = self.level[which].float() + (hidden * self.slope).float().sum(-1)
        scores = self._table(which) + level.unsqueeze(-1)
        if not torch.is_grad_enabled():
            return scores
        # straight through: the choice passes its gradient on as if the tables had been mixed
        share = F.linear(F.normalize(hidden, dim=-1), self.weight).float().softmax(-1)
        mixed = share @ self._table(torch.arange(len(self.weight), device=which.device)).detach()
        return scores + (mixed - mixed.detach())

    def _table(self, which: Tensor) -> Tensor:
        """Scores of all tokens in some clusters, `(…, V)`."""
        rest = self.prior.float() + self.floor[which].float().unsqueeze(-1)
        return rest.scatter(-1, self.ids[which].long(), self.values[which].float())

    @property
    def bytes_read(self) -> int:
        sets = sum(t.numel() * t.element_size() for t in (self.values, self.ids))
        return self.nbytes - sets + sets // len(self.weight)

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel()

    def notes(self) -> list[str]:
        clusters, tokens = self.ids.shape
        line = f"{clusters:,} clusters of contexts with {tokens:,} tokens each"
        if self.coverage is not None:
            line += f", which hold {self.coverage:.1%} of greedy tokens"
        return [line]


class _Seen(NamedTuple):
    """What the dense head says of some hidden states."""

    directions: Tensor  # h / ‖h‖, (N, D)
    total: Tensor  # log Σ exp, (N,)
    ids: Tensor  # likeliest tokens, the best first, (N, m)
    probs: Tensor  # their probabilities, (N, m)

    def part(self, which: slice) -> _Seen:
        return _Seen(*(tensor[which] for tensor in self))

    def rest(self) -> Tensor:
        return (1 - self.probs.sum(-1)).clamp_min(0)


class _Sets(NamedTuple):
    ids: Tensor  # (r, n)
    values: Tensor  # log-probabilities, (r, n)
    floor: Tensor  # what is added to the prior of the other tokens, (r,)


def _look(head: Head, states: Tensor, weight: Tensor, bias: Tensor | None, prior: Tensor) -> _Seen:
    transform = head.transform or (lambda z: z)
    count = min(_LIKELY, len(prior))

    def chunk(h: Tensor) -> Tensor:
        z = transform(scores_of(h, weight, bias))
        total = z.logsumexp(-1, keepdim=True)
        best, ids = z.topk(count, -1)
        return torch.cat([total.double(), (best - total).exp().double(), ids.double()], 1)

    found = over_states(chunk, states, len(weight), "likely tokens")
    total, probs, ids = found.split([1, count, count], 1)
    return _Seen(F.normalize(states, dim=-1), total.squeeze(1).float(), ids.long(), probs.float())


def _nearest(rows: Tensor, seen: _Seen) -> Tensor:
    return F.linear(seen.directions, rows).argmax(-1)


def _sets(rows: Tensor, seen: _Seen, prior: Tensor, tokens: int) -> _Sets:
    """The likeliest tokens of each cluster, by the mean of the dense distribution over its hidden states."""
    which, vocab = _nearest(rows, seen), len(prior)
    sums = prior.new_zeros(len(rows) * vocab)
    sums.index_add_(0, (which[:, None] * vocab + seen.ids).flatten(), seen.probs.flatten())
    count, rest = (
        prior.new_zeros(len(rows)).index_add_(0, which, x) + _SMOOTHING
        for x in (torch.ones_like(seen.total), seen.rest())
    )
    mean = (sums.view(-1, vocab) + rest[:, None] * prior.exp()) / count[:, None]
    values, ids = mean.topk(tokens, -1)
    outside = 1 - prior.exp()[ids].sum(-1)
    floor = (1 - values.sum(-1)).clamp_min(1e-6).log() - outside.clamp_min(1e-6).log()
    return _Sets(ids, values.log(), floor)


def _costs(seen: _Seen, sets: _Sets, prior: Tensor) -> Tensor:
    """Cross-entropy of each hidden state's dense distribution and each cluster's, `(N, r)`."""
    table = (prior + sets.floor[:, None]).scatter(-1, sets.ids, sets.values)
    place = torch.arange(len(seen.ids), device=prior.device)[:, None].expand_as(seen.ids)
    where = torch.stack([place.flatten(), seen.ids.flatten()])
    shape = (len(seen.ids), len(prior))
    probs = torch.sparse_coo_tensor(where, seen.probs.flatten(), shape, check_invariants=True)
    likely: Tensor = torch.sparse.mm(probs, table.T)
    return -likely - torch.outer(seen.rest(), table @ prior.exp())


def _judge(rows: Tensor, fitted: _Seen, fresh: _Seen, prior: Tensor, tokens: int) -> float:
    """Mean cross-entropy of other hidden states with their clusters."""
    costs = _costs(fresh, _sets(rows, fitted, prior, tokens), prior)
    return float(costs.gather(1, _nearest(rows, fresh)[:, None]).mean())


@torch.enable_grad()
def _train(rows: Tensor, seen: _Seen, prior: Tensor, tokens: int, seed: int) -> Tensor:
    """Rows that send hidden states to the clusters that predict them; the sets follow after every round."""
    rows = rows.clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=_LR)
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(_ROUNDS * _STEPS), desc="contexts", disable=None, leave=False):
        if step % _STEPS == 0:
            with torch.no_grad():
                costs = _costs(seen, _sets(rows, seen, prior, tokens), prior)
                costs -= costs.amin(-1, keepdim=True)
        heat = _HEATS[0] * (_HEATS[1] / _HEATS[0]) ** (step / (_ROUNDS * _STEPS))
        some = torch.randint(len(costs), (_BATCH,), generator=generator).to(costs.device)
        choice = gumbel_choice(F.linear(seen.directions[some], rows), heat, generator)
        optimizer.zero_grad()
        (choice * costs[some]).sum(-1).mean().backward()
        optimizer.step()
    return rows.detach()


def _levels(states: Tensor, total: Tensor, which: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """`slope (D,)` and `level (r,)` of least squared error of `slope · h + level_t` from `total`."""

    def means(x: Tensor) -> Tensor:
        sums = x.new_zeros(clusters, *x.shape[1:]).index_add_(0, which, x)
        sizes = torch.bincount(which, minlength=clusters).clamp_min(1)
        return sums / sizes.view(-1, *[1] * (x.ndim - 1))

    inside, centers, middle = states - means(states)[which], means(states), means(total)
    gram = inside.T @ inside
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    slope = torch.linalg.solve(gram, inside.T @ (total - middle[which]))
    level = middle - centers @ slope
    empty = torch.bincount(which, minlength=clusters) == 0
    return slope, level.masked_fill(empty, float((total - states @ slope).mean()))
