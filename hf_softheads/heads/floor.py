"""The least perplexity that a token → code map allows, however its codebook is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_softheads.heads.vq import VQHead
    from hf_softheads.stats import HeadStats


def measure(head: VQHead, stats: HeadStats) -> list[int]:
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


def lines(head: VQHead) -> list[str]:
    """What `describe` prints of them."""
    uniform, biased = (head.floor.double() / 1e6).exp().tolist()
    found = []
    if head.floor[0] >= 0:
        found.append(f"perplexity floor of the map, equal logits within a code: {uniform:.2f}")
    else:
        groups = head.groups()
        even = float(groups.sizes[groups.code_of.long()].double().log().mean().exp())
        found.append(
            f"perplexity floor of the map if all tokens were equally frequent: {even:.2f} "
            "(patch with stats=… for that of real text)"
        )
    if head.floor[1] >= 0:
        found.append(f"perplexity floor of the map with its bias as fitted: {biased:.2f}")
    return found
