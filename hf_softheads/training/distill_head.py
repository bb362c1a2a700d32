"""Repair a patched head: distil the dense head into it on the same hidden states, the body frozen."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_softheads.bridge import SplitModel, transformers_model
from hf_softheads.hardware import bf16_is_fast
from hf_softheads.heads.base import Head
from hf_softheads.heads.forms.trainable_codes import TrainableCodes
from hf_softheads.losses.base import LossSpec
from hf_softheads.losses.kl import KL
from hf_softheads.training.cached_states import Supply
from hf_softheads.training.objective import Objective, Teacher
from hf_softheads.training.pv_tuning import EVERY, DiscreteSteps, Measured

_JUDGES = 2  # batches on which a discrete step is judged
_LR = 3e-3  # of a head that suggests none
_FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the rates that a head suggests
_RISE = 1.05  # of the loss, at most, in a first step


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
    lr: float | None = None,
    code_lr: float | None = None,
    losses: Mapping[LossSpec | str, float] | None = None,
    seed: int = 0,
) -> Repair:
    """Train only the model's head, in place, to give the teacher's distribution on the model's own hidden states.

    The hidden states of `rows` are computed before they are needed and kept, at most 512 MiB of them at a time; every
    step takes `batch_size` of those at random. Of more text, one part after another gets an equal share of the steps: a
    head fits states that come back often, and no others. AdamW, a short warm-up, cosine decay to zero. Where the head's
    integer codes can be trained (`TrainableCodes`), they are real numbers meanwhile, rounded in every step with the
    gradient passed straight through, and integers again afterwards: what is stored keeps its size. That takes six
    times the fp32 dense matrix in memory. Where rows are sums of codebook entries, every twentieth step is followed by
    a discrete one, `DiscreteSteps`, which a rising loss takes back.

    Args:
        model: a patched model.
        teacher: its dense head, `dense_head(model)`, or that head's matrix `(V, D)`; None with losses of the labels
            alone.
        rows: token windows `(N, W)` of training text; or what `cache_states` made of them, for several repairs.
        lr: of the parameters; None: what the head says suits each, `TrainableCodes.repair_lr`, times the
            largest of five factors up to 1 with which a first step raises the loss by no more than 5 %.
        code_lr: of the codes, in codes a step; 0 leaves all codes alone; None: the head's `code_lr`.
        losses: default the forward KL; several with weights as for `Objective`.
        seed: of the order of the hidden states.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: nothing to train, no text, tokens outside the vocabulary, a teacher of another one; or a loss that
            is not finite or higher at the end than at the start, after which the head is as it was.
    """
    head = SplitModel(transformers_model(model)).head
    trained = [p for p in head.parameters() if p.is_floating_point()]
    if not trained:
        raise ValueError(f"the head {type(head).__name__} has no floating-point parameter to train")
    if steps < 1 or batch_size < 1:
        raise ValueError(
            f"repair needs at least one step of one token, got {steps} of {batch_size}"
        )
    losses = losses or {KL(): 1.0}
    step_of = _Step(model, losses, teacher)  # refuses before the text is read
    supply = Supply(model, rows, steps, batch_size, seed)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    wanted = [p.requires_grad for p in trained]
    for p in trained:
        p.requires_grad_(True)
    rates = [_LR if lr is None else lr] * len(trained)
    codes: list[Tensor] = []
    discrete = None
    if isinstance(head, TrainableCodes):
        if code_lr != 0 and head.additive() is not None:
            discrete = DiscreteSteps(head, step_of.measure)
        rates = [head.repair_lr(p) for p in trained] if lr is None else rates
        code_lr = head.code_lr if code_lr is None else code_lr
        codes = head.relax_codes() if code_lr else []
    if lr is None:
        factor = _best_factor(step_of, supply.peek(batch_size), trained, rates)
        rates = [factor * rate for rate in rates]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(trained, rates, strict=True)]
    if codes:
        groups.append({"params": codes, "lr": float(code_lr or 0)})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    curve: list[float] = []
    begin: tuple[Tensor, Tensor] | None = None
    try:
        with tqdm(total=steps, desc="repair", disable=None) as bar:
            for step in range(steps):
                batch = supply.batch(step)
                begin = begin or batch
                curve.append(step_of(*batch))
                if not math.isfinite(curve[-1]):
                    raise ValueError(
                        f"the loss is {curve[-1]} at step {step} of {steps}; the head was put back. Try a smaller lr"
                    )
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                if discrete is not None and step_of.gradient is not None:
                    discrete.note(step_of.gradient)
                    if (step + 1) % EVERY == 0 and step + 1 < steps:
                        discrete.take(supply.states, *supply.draw(_JUDGES * batch_size))
                bar.update()
                bar.set_postfix(loss=f"{curve[-1]:.3f}", refresh=False)
    finally:
        if isinstance(head, TrainableCodes):
            head.round_codes()
        if curve and not math.isfinite(curve[-1]):
            head.load_state_dict(before)
        for p, flag in zip(trained, wanted, strict=True):
            p.requires_grad_(flag)
            p.grad = None
    tenth = max(1, steps // 10)
    first, last = sum(curve[:tenth]) / tenth, sum(curve[-tenth:]) / tenth
    assert begin is not None
    if last > first and not (again := step_of.loss(*begin)) <= curve[0]:
        head.load_state_dict(before)
        raise ValueError(
            f"the repair made the head worse: on the first batch the loss was {curve[0]:.4g} before and is {again:.4g} "
            f"after {steps} steps; the head was put back. Try a smaller lr"
        )
    return Repair(steps, supply.seen, first, last)


def _best_factor(
    step_of: _Step, batch: tuple[Tensor, Tensor], trained: list[Tensor], rates: list[float]
) -> float:
    """What to multiply the rates by: the first of `_FACTORS` with which AdamW's first step does little harm.

    That step moves every number by its rate, whatever its gradient; the next ones make a small loss good. What suits a
    head that has much to learn ruins one that is nearly right.
    """
    half = len(batch[1]) // 2
    apart = [part[half:] for part in batch]
    start = step_of.loss(*apart)
    step_of(*(part[: half or None] for part in batch))
    before = [p.detach().clone() for p in trained]
    signs = [torch.zeros_like(p) if p.grad is None else p.grad.sign() for p in trained]
    for factor in _FACTORS:
        with torch.no_grad():
            for p, old, sign, rate in zip(trained, before, signs, rates, strict=True):
                p.copy_(old - factor * rate * sign)
        if step_of.loss(*apart) <= _RISE * start:
            break
    with torch.no_grad():
        for p, old in zip(trained, before, strict=True):
            p.copy_(old)
            p.grad = None
    step_of.gradient = None
    return factor


class _Step:
    """The gradients of one step. A head that is a matrix in another form builds it once for all tokens of the step."""

    def __init__(self, model: nn.Module, losses: Mapping[LossSpec | str, float], teacher: Teacher):
        self.head = SplitModel(transformers_model(model)).head
        self.dtype = torch.float32
        plain = teacher is None or isinstance(teacher, Tensor | nn.Linear)
        if plain and self._parts() is not None and bf16_is_fast(self.head.weight.device):
            self.dtype = torch.bfloat16
            if isinstance(teacher, nn.Linear):
                teacher = copy.deepcopy(teacher).to(self.dtype)
        self.goal = Objective(model, losses, teacher)
        self.gradient: Tensor | None = None  # in the dense matrix, of the last step

    def __call__(self, hidden: Tensor, labels: Tensor) -> float:
        device = self.head.weight.device
        hidden, labels = hidden.to(device), labels.to(device)
        parts = self._parts()
        if parts is None:
            loss = self.goal.from_hidden(hidden, labels)
            loss.backward()
            return float(loss.detach())
        value, gradients = self._backward(parts, hidden, labels)
        torch.autograd.backward(parts, gradients)
        self.gradient = gradients[0]
        return value

    @torch.no_grad()
    def loss(self, hidden: Tensor, labels: Tensor) -> float:
        """The loss of the head as it is."""
        device = self.head.weight.device
        parts = self._parts()
        dense = None if parts is None else _linear(parts)
        hidden = hidden.to(device) if dense is None else hidden.to(device, self.dtype)
        return float(self.goal.from_hidden(hidden, labels.to(device), dense))

    def measure(self, hidden: Tensor, labels: Tensor) -> Measured:
        """Loss, matrix and gradient, without a trace in the parameters."""
        parts = self._parts()
        assert parts is not None
        device = self.head.weight.device
        loss, gradients = self._backward(parts, hidden.to(device), labels.to(device))
        return Measured(loss, parts[0].detach(), gradients[0])

    @torch.enable_grad()
    def _backward(
        self, parts: list[Tensor], hidden: Tensor, labels: Tensor
    ) -> tuple[float, list[Tensor]]:
        """The loss of a matrix and a bias, and its gradients in them."""
        dense = _linear(parts)
        leaves = list(dense.parameters())
        loss = self.goal.from_hidden(hidden.to(self.dtype), labels, dense)
        loss.backward()
        return float(loss.detach()), [leaf.grad for leaf in leaves if leaf.grad is not None]

    def _parts(self) -> list[Tensor] | None:
        """The head as a matrix and, if it has one, a bias."""
        found = self.head.dense() if isinstance(self.head, Head) else None
        return None if found is None else [part for part in found if part is not None]


def _linear(parts: list[Tensor]) -> nn.Linear:
    """A dense head of a matrix and, if there is one, a bias; its parameters in this order."""
    vocab, dim = parts[0].shape
    dense = nn.Linear(dim, vocab, bias=len(parts) > 1, device="meta")
    dense.weight = nn.Parameter(parts[0].detach())
    if len(parts) > 1:
        dense.bias = nn.Parameter(parts[1].detach())
    return dense
