"""Repair a patched head: distil the dense head into it on the same hidden states, the body frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads.bridge import Reader, base_model
from hf_softheads.losses.base import LossSpec
from hf_softheads.losses.kl import KL
from hf_softheads.objective import Objective

CACHE_BYTES = 2**29


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    Attributes:
        steps: optimizer steps.
        tokens: different hidden states seen.
        first, last: mean loss over the first and the last tenth of the steps, nats.
    """

    steps: int
    tokens: int
    first: float
    last: float


def repair_head(
    model: nn.Module,
    teacher: nn.Module | Tensor | None,
    rows: Tensor | tuple[Tensor, Tensor],
    *,
    steps: int = 400,
    batch_size: int = 2048,
    lr: float = 3e-3,
    losses: Mapping[LossSpec | str, float] | None = None,
    seed: int = 0,
) -> Repair:
    """Train only the model's head, in place, to give the teacher's distribution on the model's own hidden states.

    The hidden states of `rows` are computed once and kept (at most 512 MiB of them); every step takes `batch_size` of
    them at random. AdamW, a short warm-up, cosine decay to zero.

    Args:
        model: a patched model.
        teacher: its dense head, `dense_head(model)`, or that head's matrix `(V, D)`; None with losses of the labels
            alone.
        rows: token windows `(N, W)` of training text; or what `cache_states` made of them, for several repairs.
        losses: default the forward KL; several with weights as for `Objective`.
        seed: of the order of the hidden states.

    Raises:
        ValueError: nothing to train, no text, a teacher of another vocabulary, or a loss that is not finite,
            after which the head is as it was.
    """
    reader = Reader(base_model(model))
    head = reader.head
    trained = [p for p in head.parameters() if p.is_floating_point()]
    if not trained:
        raise ValueError(f"the head {type(head).__name__} has no floating-point parameter to train")
    if steps < 1 or batch_size < 1:
        raise ValueError(
            f"repair needs at least one step of one token, got {steps} of {batch_size}"
        )
    goal = Objective(model, losses or {KL(): 1.0}, teacher)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(rows, Tensor):
        rows = cache_states(model, rows, tokens=steps * batch_size, seed=seed)
    hidden, labels = rows
    before = {k: v.clone() for k, v in head.state_dict().items()}
    wanted = [p.requires_grad for p in trained]
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    curve: list[float] = []
    try:
        with tqdm(total=steps, desc="repair", disable=None) as bar:
            for step in range(steps):
                share = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
                for group in optimizer.param_groups:
                    group["lr"] = lr * share
                chosen = torch.randint(len(hidden), (batch_size,), generator=generator)
                loss = goal.from_hidden(
                    hidden[chosen].to(head.weight.device), labels[chosen].to(head.weight.device)
                )
                curve.append(float(loss.detach()))
                if not math.isfinite(curve[-1]):
                    head.load_state_dict(before)
                    raise ValueError(
                        f"the loss is {curve[-1]} at step {step} of {steps}; the head was put back. Try a smaller lr"
                    )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{curve[-1]:.3f}", refresh=False)
    finally:
        for p, flag in zip(trained, wanted, strict=True):
            p.requires_grad_(flag)
            p.grad = None
    tenth = max(1, steps // 10)
    first, last = sum(curve[:tenth]) / tenth, sum(curve[-tenth:]) / tenth
    return Repair(steps, len(hidden), first, last)


@torch.no_grad()
def cache_states(
    model: nn.Module, rows: Tensor, *, tokens: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """About `tokens` hidden states `(S, D)` of token windows `(N, W)` and the tokens `(S,)` that follow, on the CPU.

    At most 512 MiB of them, in random order of the windows.

    Raises:
        ValueError: no windows of at least two tokens.
    """
    if rows.ndim != 2 or rows.shape[1] < 2 or not len(rows):
        raise ValueError(f"repair needs token windows (N, W ≥ 2), got {tuple(rows.shape)}")
    reader = Reader(base_model(model))
    device = reader.head.weight.device
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    kept: list[tuple[Tensor, Tensor]] = []
    size = total = 0
    training = reader.model.training
    reader.model.eval()
    try:
        for batch in tqdm(rows[order].split(8), desc="hidden states", disable=None):
            hidden = reader.hidden(input_ids=batch.to(device))[:, :-1]
            kept.append((hidden.flatten(0, 1).cpu(), batch[:, 1:].flatten()))
            size += hidden.numel() * hidden.element_size()
            total += kept[-1][1].numel()
            if total >= tokens or size >= CACHE_BYTES:
                break
    finally:
        reader.model.train(training)
    return torch.cat([h for h, _ in kept]), torch.cat([y for _, y in kept])
