"""A small dense head with the shape of a real one: skewed token frequencies, correlated hidden states."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_softheads.heads.base import HeadSpec, LogitTransform
from hf_softheads.heads.stats import HeadStats


@dataclass(frozen=True)
class Toy:
    weight: Tensor  # (V, D)
    hidden: Tensor  # (N, D), not among the states of `stats`
    labels: Tensor  # (N,)
    stats: HeadStats

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[0]


def make_toy(vocab: int, dim: int, states: int = 2048, seed: int = 0) -> Toy:
    """Statistics by their definitions, from states drawn around likely tokens' rows."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixing = randn(dim, dim) / dim**0.5 * torch.linspace(2, 0.2, dim)
    weight = randn(vocab, dim) @ mixing * 0.7 + randn(dim) * 0.3
    zipf = 1 / torch.arange(1, vocab + 1).float()
    topic = torch.multinomial(zipf, 2 * states, replacement=True, generator=generator)
    hidden = weight[topic] * 0.8 + randn(2 * states, dim) @ mixing + 0.3
    prob = (hidden @ weight.T).softmax(-1)
    labels = torch.multinomial(prob, 1, generator=generator).squeeze(1)
    seen, p, y = hidden[:states], prob[:states], labels[:states]
    smooth = 0.9 * p + 0.1 / vocab
    stats = HeadStats(
        second_moment=(seen.double().T @ seen.double()) / states,
        mean=seen.double().mean(0),
        token_counts=torch.bincount(y, minlength=vocab),
        mean_prob=p.mean(0),
        curvature=(smooth * (1 - smooth)).mean(0),
        prob_weighted_mean=(p.T @ seen) / p.sum(0)[:, None],
        states=seen,
        labels=y,
        tokens=states,
    )
    return Toy(weight, hidden[states:], labels[states:], stats)


@pytest.fixture(scope="session")
def toy() -> Toy:
    return make_toy(256, 16)


def fit(spec: HeadSpec, toy: Toy, *, stats: bool = True) -> Any:
    """A head fitted to the toy, with or without its statistics."""
    spec.check(*toy.shape)
    head = spec.module(*toy.shape)
    spec.fit(head, toy.weight, None, toy.stats if stats else None)
    return head


_FITTED: dict[tuple[HeadSpec, int, bool], tuple[Toy, Any]] = {}


def fitted(
    spec: HeadSpec, toy: Toy, transform: LogitTransform | None = None, *, bias: bool = False
) -> Any:
    """A copy of a head that is fitted once for all tests with this toy, in a family that does `transform`; the dense
    head has a bias from −1 to 1 if asked."""
    key = spec, id(toy), bias
    if key not in _FITTED:
        spec.check(*toy.shape)
        head = spec.module(*toy.shape, bias=bias)
        offsets = torch.linspace(-1, 1, len(toy.weight)) if bias else None
        spec.fit(head, toy.weight, offsets, toy.stats)
        _FITTED[key] = toy, head  # the toy too: while it lives, its id is its own
    head = copy.deepcopy(_FITTED[key][1])
    head.transform = transform or LogitTransform()
    return head


@torch.no_grad()
def kl(head: Any, toy: Toy) -> float:
    """`E KL(dense ‖ head)` in nats."""
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)
    mine = head.logits(toy.hidden).log_softmax(-1)
    return float((dense.exp() * (dense - mine)).sum(-1).mean())
