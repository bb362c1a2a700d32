"""How far a head's distribution is from the dense one's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hf_softheads.heads.base import Head
from hf_softheads.losses.base import kl_divergence

_ELEMENTS = 2**24  # logits held at once


def from_dense(
    head: Head, weight: Tensor, bias: Tensor | None, states: Tensor
) -> tuple[float, float]:
    """Mean `KL(dense ‖ head)` in nats on hidden states `(N, D)`, and how often their best tokens agree."""
    kl = agreement = 0.0
    transform = head.transform or (lambda z: z)
    for h in states.split(max(1, _ELEMENTS // len(weight))):
        dense = transform(F.linear(h, weight.float(), bias)).log_softmax(-1)
        mine = transform(head.scores(h).float()).log_softmax(-1)
        kl += float(kl_divergence(dense, mine).sum())
        agreement += float((dense.argmax(-1) == mine.argmax(-1)).sum())
    return kl / len(states), agreement / len(states)
