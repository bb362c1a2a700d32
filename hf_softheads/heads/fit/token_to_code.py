"""Which token has which code: the first map, moving tokens to better codes, and learning the map with the codebook."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from hf_softheads.heads.fit.blockwise import gumbel_choice
from hf_softheads.heads.fit.hessian import metric_root
from hf_softheads.heads.fit.kmeans import Rows, fill_empty, kmeans, nearest, require_finite
from hf_softheads.heads.fit.perplexity_floor import measure_floor
from hf_softheads.heads.forms.vq_module import VQHead

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats

_BATCH = 512  # hidden states a step
_ROWS = 2**22  # distances or logits held at once
_JUDGES = 1024  # hidden states on which the result is judged


def initial_map(
    weight: Tensor,
    stats: HeadStats | None,
    *,
    codes: int,
    singletons: int,
    init: str,
    metric: str,
    centred: bool,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Code of each token and its weight in the mean of the code, `(V,)` both; arguments as the fields of `VQ`."""
    vocab = len(weight)
    row_weights = torch.ones(vocab, device=weight.device)
    root = None
    if stats is not None and metric == "activation":
        row_weights = stats.mean_prob.to(weight.device)
        root = metric_root(stats, centred=centred)[0]
    labels = torch.empty(vocab, dtype=torch.long, device=weight.device)
    shared = torch.arange(vocab, device=weight.device)
    if stats is not None and singletons:
        order = stats.frequency.argsort(descending=True).to(weight.device)
        labels[order[:singletons]] = torch.arange(singletons, device=weight.device)
        shared = order[singletons:].sort().values
    shared_codes = codes - singletons
    if init == "kmeans":
        points = Rows(weight, shared)
        found = kmeans(
            points, shared_codes, weights=row_weights[shared], metric=root, seed=seed
        ).labels
    elif init == "random":
        generator = torch.Generator().manual_seed(seed)
        found = torch.randint(shared_codes, (len(shared),), generator=generator).to(weight.device)
    else:
        found = torch.arange(len(shared), device=weight.device) * shared_codes // len(shared)
    labels[shared] = found + singletons
    return labels, row_weights


@torch.no_grad()
def reassign(head: VQHead, weight: Tensor, stats: HeadStats | None = None) -> int:
    """Move every token to the code nearest to its trained row `weight (V, D)`; how many moved.

    With `stats` distances are in the activation metric. A token's bias changes so that its mean logit stays; singleton
    codes and their tokens stay; a code left empty takes the token that fits its own code worst. Between rounds of
    training the codebook, this lets the map follow it.
    """
    require_finite(weight, "output rows")
    shared = _shared(head)
    root = _metric(head, weight, stats)
    labels, cost = nearest(
        Rows(weight, shared), head.weight[head.singletons :].float(), metric=root
    )
    old = head.codes.long()
    moved = _install(head, shared, labels, cost, weight)
    if head.bias is not None and stats is not None:
        mean = F.linear(stats.mean.to(head.weight), head.weight)
        head.bias.add_(mean[old] - mean[head.codes.long()])
    measure_floor(head, stats)
    return moved


def learn_assignment(
    head: VQHead,
    weight: Tensor,
    stats: HeadStats,
    *,
    steps: int = 200,
    candidates: int = 8,
    tokens: int = 1024,
    temperatures: tuple[float, float] = (1.0, 0.1),
    lr: float = 0.05,
    codebook_lr: float = 1e-3,
    seed: int = 0,
) -> int:
    """Learn map and codebook together with Gumbel-softmax (Jang et al., arXiv 1611.01144); how many tokens moved.

    Each token chooses among its nearest codes: `softmax((θ + g) / τ)`, g Gumbel noise, τ falling exponentially, hard
    in the forward pass and soft in the backward one. A step looks at some hidden states and some tokens, drawn by their
    mean probability, and takes the KL divergence from the dense head among those, so that it never holds
    `(states, V)`. The bias trains too. At the end every token gets the code of its largest θ.
    Helps a map in its published form; one that was repaired already is rarely improved. An eighth of the hidden states
    is held out: where the divergence from the dense head on those did not fall, the head is put back as it was.

    Args:
        weight: the dense matrix `(V, D)`.
        stats: whose hidden states and mean probabilities are used.
        candidates: codes that a token chooses among.
        tokens: sampled for a step.
        temperatures: first and last τ.

    Raises:
        ValueError: a field that makes no sense, or statistics of another model.
    """
    vocab, dim = weight.shape
    stats.check(dim, vocab)
    codes = len(head.weight) - head.singletons
    if not 1 < candidates <= codes or steps < 1 or not tokens > 1 or min(temperatures) <= 0:
        raise ValueError(
            f"asked for {steps} steps, {candidates} candidates of {codes} shared codes, {tokens} tokens and the "
            f"temperatures {temperatures}; at least 1 step, 2 to {codes} candidates, 2 tokens and positive "
            "temperatures are possible"
        )
    require_finite(weight, "output rows")
    shared = _shared(head)
    root = _metric(head, weight, stats)
    chosen, distance = _nearest_codes(head, weight[shared], root, candidates)
    options = head.codes.long()[:, None].repeat(1, candidates)  # a singleton has no other choice
    options[shared] = chosen + head.singletons
    near, far = distance.aminmax(dim=1, keepdim=True)
    theta = torch.zeros(vocab, candidates, device=weight.device)
    theta[shared] = (near - distance) / (far - near + 1e-12)
    theta.requires_grad_()
    book = head.weight.detach().float().clone().requires_grad_()
    groups = [{"params": [theta], "lr": lr}, {"params": [book], "lr": codebook_lr}]
    bias = None
    if head.bias is not None:
        bias = head.bias.detach().float().clone().requires_grad_()
        groups.append({"params": [bias], "lr": codebook_lr})
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    probability = stats.mean_prob.double() + 1e-12
    count = min(tokens, vocab)
    share_drawn = (count * probability / probability.sum()).clamp_max(1)
    log_rarity = -share_drawn.log().float().to(weight.device)
    held_out = stats.states[: max(1, min(_JUDGES, len(stats.states) // 8))].to(weight.device)
    states = stats.states[len(held_out) :] if len(stats.states) > 1 else stats.states
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    start = _divergence(head, weight, held_out)
    gain = head.gain
    for step in tqdm(range(steps), desc="assignment", disable=None, leave=False):
        share = step / max(steps - 1, 1)
        heat = temperatures[0] * (temperatures[1] / temperatures[0]) ** share
        where = torch.randint(len(states), (min(_BATCH, len(states)),), generator=generator)
        h = states[where].to(weight.device)
        some = torch.multinomial(probability, count, generator=generator).to(weight.device)
        picked = gumbel_choice(theta[some], heat, generator)
        rows = (picked.unsqueeze(-1) * book[options[some]]).sum(1)
        scores = F.linear(h, rows, None if bias is None else bias[some])
        rarity = log_rarity[some]  # a token drawn seldom stands for many
        log_q = (gain * scores + rarity).log_softmax(-1)
        log_p = (gain * F.linear(h, weight[some].float()) + rarity).log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"the loss is {float(loss.detach())} at step {step}; try a smaller lr")
    with torch.no_grad():
        head.weight[head.singletons :] = book[head.singletons :].to(head.weight.dtype)
        best = theta[shared].argmax(-1, keepdim=True)
        labels = chosen.gather(1, best).squeeze(1)
        cost = distance.gather(1, best).squeeze(1)
        moved = _install(head, shared, labels, cost, weight)
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)
        measure_floor(head, stats)
    if not _divergence(head, weight, held_out) < start:
        head.load_state_dict(before)
        return 0
    return moved


@torch.no_grad()
def _divergence(head: VQHead, weight: Tensor, states: Tensor) -> float:
    """`E KL(dense ‖ head)`, a chunk of logits at a time."""
    total = 0.0
    for h in states.split(max(1, _ROWS // len(weight))):
        log_p = (head.gain * F.linear(h, weight.float())).log_softmax(-1)
        log_q = (head.gain * head.scores(h.to(head.weight.dtype))).log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(states)


def _shared(head: VQHead) -> Tensor:
    """Tokens that are not alone on a singleton code."""
    return (head.codes.long() >= head.singletons).nonzero().flatten()


def _metric(head: VQHead, weight: Tensor, stats: HeadStats | None) -> Tensor | None:
    if stats is None:
        return None
    stats.check(head.in_features, head.out_features)
    return metric_root(stats, centred=head.bias is not None)[0].to(weight.device)


@torch.no_grad()
def _nearest_codes(
    head: VQHead, rows: Tensor, root: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """The nearest shared codes of each row and their squared distances, `(n, count)`, its own code among them."""
    centers = head.weight[head.singletons :].float()
    own = head.codes.long()[_shared(head)] - head.singletons
    if root is not None:
        rows, centers = rows.float() @ root.float(), centers @ root.float()
    found, away = [], []
    size = max(1, _ROWS // len(centers))
    for part, mine in zip(rows.split(size), own.split(size), strict=True):
        distance = torch.cdist(part.float(), centers).square()
        place = torch.arange(len(part), device=part.device)
        kept = distance[place, mine].clone()
        distance[place, mine] = -1  # always among them
        near, which = distance.topk(count, largest=False)
        near[:, 0] = kept
        found.append(which)
        away.append(near)
    return torch.cat(found), torch.cat(away)


def _install(head: VQHead, shared: Tensor, labels: Tensor, cost: Tensor, weight: Tensor) -> int:
    """Give the tokens `shared` new codes and fill codes left empty; how many moved."""
    old = head.codes.long()
    before = labels.clone()
    fill_empty(labels, cost, len(head.weight) - head.singletons)
    new = old.clone()
    new[shared] = labels + head.singletons
    refilled = shared[labels != before]
    head.weight[new[refilled]] = weight[refilled].to(head.weight.dtype)
    head.codes.copy_(new)
    return int((new != old).sum())
