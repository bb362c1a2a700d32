"""Log-probability, entropy and best token of hidden states under any head, patched or not, without all logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_softheads.bridge import is_hooked
from hf_softheads.heads import base
from hf_softheads.heads.base import Head, LogitTransform
from hf_softheads.heads.forms.matrix_numbers import Walk, of_matrix
from hf_softheads.heads.forms.sampling import check_temperature
from hf_softheads.heads.forms.token_numbers import (
    TokenStatistics,
    as_statistics,
    labelled,
    of_logits,
)


def token_statistics(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    transform: LogitTransform | None = None,
    ignore_index: int = -100,
) -> TokenStatistics:
    """`log p(label)`, entropy and best token of `p = softmax(transform(head(hidden)) / temperature)`, each `(…)`.

    Exactly 0 where `label == ignore_index`, which is not computed at all. Gradients flow through the log-probability
    and the entropy. An `nn.Linear` is walked over in blocks of the vocabulary, a patched head in its own way, any
    other (with an adapter or a hook, say) in chunks of tokens. `transform`: what the model does to its logits after the
    head; a patched head knows its own.
    """
    check_temperature(temperature)
    if isinstance(head, Head) and not is_hooked(head):
        return head.token_statistics(hidden, labels, temperature, ignore_index)
    width = int(getattr(head, "out_features", 2**17))
    known = head.transform if isinstance(head, Head) else None
    after = transform or known or LogitTransform()

    def of_linear(h: Tensor, y: Tensor) -> Tensor:
        assert isinstance(head, nn.Linear)
        walk = Walk(after, temperature, moments=False, elements=base._CHUNK_ELEMENTS)
        return of_matrix(h, head.weight, head.bias, y, walk)

    def of_any(h: Tensor, y: Tensor) -> Tensor:
        def chunk(h: Tensor, y: Tensor) -> Tensor:
            return of_logits(after(head(h).float()) / temperature, y, False)

        rows = max(1, base._CHUNK_ELEMENTS // width)
        parts = zip(h.split(rows), y.split(rows), strict=True)
        return torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])

    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    numbers = of_linear if linear and not is_hooked(head) else of_any
    return as_statistics(labelled(numbers, hidden, labels, ignore_index))
