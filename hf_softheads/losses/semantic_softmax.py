"""Cross-entropy on every level of a tree of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_softheads.losses.base import LossSpec, pick
from hf_softheads.registry import CountOrZero, NotNegative


@dataclass(frozen=True)
class SemanticSoftmax(LossSpec, name="semantic_softmax"):
    """`−Σ_l weight_l log P(node_l(y))`, `P(n) = Σ_{v: node_l(v) = n} p_v`: the right branch counts, not only the leaf.

    After Ridnik et al., 2104.10972 (semantic softmax over a hierarchy), with the nodes' probabilities summed from
    their tokens instead of separate outputs. `levels[l][v]` is the node of token v on level l; the tokens themselves
    are a further level with weight `leaf`. `weights` default to 1 for every level.

    Raises:
        ValueError: a level does not have one node per token.
    """

    levels: tuple[tuple[CountOrZero, ...], ...]
    weights: tuple[NotNegative, ...] = ()
    leaf: NotNegative = 1.0

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.levels):
            raise ValueError(
                f"semantic_softmax has {len(self.levels)} levels and {len(self.weights)} weights"
            )

    def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        log_p = logits.log_softmax(-1)
        loss = -self.leaf * pick(log_p, labels)
        for level, weight in zip(
            self.levels, self.weights or (1.0,) * len(self.levels), strict=True
        ):
            if len(level) != logits.shape[-1]:
                raise ValueError(
                    f"a level of semantic_softmax has {len(level)} nodes for {logits.shape[-1]} tokens"
                )
            node = torch.tensor(level, device=logits.device)
            same = node == node[labels].unsqueeze(-1)
            loss = loss - weight * log_p.masked_fill(~same, -torch.inf).logsumexp(-1)
        return loss
