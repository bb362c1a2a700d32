"""The least perplexity that a token → code map allows, however its codebook is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_softheads.heads.forms.vq_module import VQHead

if TYPE_CHECKING:
    from hf_softheads.heads.stats import HeadStats


@torch.no_grad()
def measure_floor(head: VQHead, stats: HeadStats | None) -> None:
    """Record the least mean loss that any codebook can reach on tokens as frequent as in `stats`."""
    head.floor.copy_(torch.tensor([-1, -1] if stats is None else _floors(head, stats)))


def _floors(head: VQHead, stats: HeadStats) -> list[int]:
    """Floors of the mean loss on tokens as frequent as in `stats`, millionths of a nat.

    `E log n_code(y)` without a bias, `-E log π(y | code)` with it as it is; -1 where the head has none.
    """
    counts = stats.token_counts.to(head.codes.device).double()
    groups = head.groups()
    index = groups.code_of.long()
    losses = [groups.sizes.double().log()[index]]
    if head.bias is not None:
        losses.append(head.code_mass().double()[index] - head.bias.double() * head.gain)
    found = [round(1e6 * float((counts * loss).sum() / counts.sum())) for loss in losses]
    return [*found, -1][:2]
