"""Losses on a language model: shift, mask, chunks, weights and the teacher."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hf_softheads.bridge import (
    FEW,
    IGNORE,
    Function,
    SplitModel,
    asks_for_loss,
    base_model,
    check_own_loss,
    check_transform,
    few_tokens,
    head_as,
    loss_as,
    loss_of,
    output_head,
    targets_of,
    transformers_model,
    vocabulary,
    with_decoder_inputs,
)
from hf_softheads.heads.base import TokenStatistics
from hf_softheads.losses.base import HiddenLoss, LossSpec
from hf_softheads.losses.cross_entropy import CrossEntropy
from hf_softheads.registry import spec_from_dict
from hf_softheads.training.dispatch import WeightedLosses
from hf_softheads.training.fused_ce import backend as find_backend
from hf_softheads.training.teacher import Teacher as Teacher
from hf_softheads.training.teacher import TeacherSide, is_model
from hf_softheads.training.token_chunks import widened
from hf_softheads.training.token_statistics import token_statistics

Reduction = Literal["mean", "sum", "none"]


class _Call(NamedTuple):
    """One call's labels, for the stand-in of the head."""

    kept: Tensor  # (B, T) bool
    labels: Tensor  # (n,)
    scale: float | None  # None: per token
    teacher_hidden: Tensor | None  # (B, T, Dt)
    forward: Function


class Objective:
    """A weighted sum of losses of a causal language model, without its `(tokens, V)` logits.

        goal = Objective(model, {losses.CrossEntropy(): 1.0, losses.KL(): 0.5}, teacher=dense)
        goal(input_ids=ids, labels=ids).backward()

    equals `F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())` plus half the KL from the
    teacher. The model runs its own forward with its head replaced for the call, so any family, adapter or wrapper (DDP,
    FSDP2, `torch.compile`) works; only positions with a label are scored, and gradients are computed chunk by chunk in
    the forward pass, with fp32 sums. What the model's own forward adds to its loss, such as a router's balance, stays
    in it. A model with an encoder predicts each label at its own place, as its decoder reads them shifted already.

    Args:
        model: a language model, patched or not, wrapped or not.
        losses: loss specs (or their names) with their weights.
        teacher: for distillation losses: the dense matrix `(V, D)` or a head module, which see the same hidden states
            as the model's head, or those of width Dt that a call gives as `teacher_hidden`; or another model of the
            same vocabulary, which runs on the same batch unless `teacher_hidden` is given. The scores that a matrix or
            an `nn.Linear` makes of `teacher_hidden` count as they are: of a family with a soft cap or a scale, pass the
            model, or a head of this package with its `transform`.
        memory: bytes of logits that may be kept at once, in the dtype of the hidden states; 512 MiB by default. A
            cross-entropy (any loss of a few numbers per token) computes those that do not fit a second time, so that
            `memory=2**25` is its lean mode: a third more work. So do `kl`, `reverse_kl` and `jsd` between two dense
            heads (`jsd` a third time); the teacher's scores count too.
        backend: compute the gradients of a plain cross-entropy of a dense head by `torch` (`F.linear_cross_entropy`),
            `liger` or `cce` (cut-cross-entropy) instead; refused where that is less exact.

    Raises:
        ImportError: the backend is not installed.
        TypeError: `model` is not a transformers model, or `teacher` none of what it may be.
        ValueError: no loss, a backend for other losses, a teacher that is missing, unused or of another vocabulary, a
            model without an output embedding, or one that changes its logits in a way that is not understood.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[LossSpec | str, float],
        teacher: Teacher = None,
        *,
        memory: int = 2**29,
        backend: str | None = None,
    ):
        if memory < 0:
            raise ValueError(f"memory is a number of bytes, got {memory}")
        if not isinstance(teacher, Tensor | nn.Module | None):
            raise TypeError(
                "a teacher is a matrix (V, D), a head module or a loaded model of the same vocabulary, got "
                f"{type(teacher).__name__}"
            )
        self.model = model
        self.losses = _weighted(losses)
        self.teacher = teacher
        reader = SplitModel(transformers_model(model))
        self.vocab, self.transform = reader.vocab, reader.transform
        self._weighted = WeightedLosses(self.losses, self.vocab, self.transform, memory, backend)
        _check_losses(self.losses, teacher, self.vocab)
        _check_backend(backend, self.losses)
        self._teacher = TeacherSide(teacher, model, self.transform)
        self._transform_checked = False
        self._stand_in = torch.compiler.disable(self._score)
        self._keep = torch.compiler.disable(self._keep_output)
        self._loss_of_family = torch.compiler.disable(self._own_loss)
        self._family_loss: Callable[..., Tensor] | None = None
        self._aligned = bool(base_model(model).config.is_encoder_decoder)
        self._call: _Call | None = None
        self._out: Tensor | None = None

    def __call__(
        self,
        *,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        reduction: Reduction = "mean",
        teacher_hidden: Tensor | None = None,
        **batch: Any,
    ) -> Tensor:
        """The loss of a batch as the model's forward takes it.

        Args:
            labels: `(B, T)` token ids; position t is predicted from the states before it; -100 does not count.
                `(B, T, P)`, filled up with -100, for losses that take several right tokens.
            batch: `shift_labels` and `ignore_index` mean what they mean to transformers' losses.
            num_items_in_batch: divide by this instead of by the number of labels here: with gradient accumulation or
                several processes, the number in the whole batch.
            reduction: `none` gives `(B, T - 1)`: the loss of predicting token t + 1, 0 where masked.
            teacher_hidden: `(B, T, Dt)`, what the teacher's own body hands to its head for these tokens.

        Returns:
            A scalar, or `(B, T - 1)`; with no label at all exactly 0, with zero gradients.

        Raises:
            ValueError: labels outside the vocabulary or not shaped as the hidden states; hidden states of the teacher
                that are missing, not wanted, or not shaped as the labels and its head say.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        batch.setdefault("use_cache", False)
        with self._instead_of_logits(
            labels, batch, num_items_in_batch, reduction, teacher_hidden
        ) as inputs:
            output = self.model(**inputs)
            out = self._out
        if reduction != "none":
            return self._total(output, out)
        each = self._given(out)[..., 0]
        return each if self._aligned or "shift_labels" in batch else each[:, :-1]

    @contextlib.contextmanager
    def _instead_of_logits(
        self,
        labels: Tensor,
        batch: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None,
        reduction: Reduction,
        teacher_hidden: Tensor | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Within the context the model's head computes this loss on the labels; what it gave is in `_out`. Gives what
        the model is to be called with."""
        base, inputs = base_model(self.model), dict(batch)
        about = {k: inputs.pop(k) for k in ("shift_labels", "ignore_index") if k in inputs}
        targets = targets_of(base, labels, **about)
        kept = targets != IGNORE if targets.ndim == 2 else (targets != IGNORE).any(-1)
        chosen = targets[kept]
        _check_labels(chosen, self.vocab)
        self._teacher.check(teacher_hidden, tuple(labels.shape[:2]), runs=True)
        with_decoder_inputs(base, labels, inputs)
        asks = asks_for_loss(base)
        few = few_tokens(inputs)
        if not self._transform_checked and {"input_ids", "inputs_embeds"} & few.keys():
            if not asks and labels.ndim == 2 and not about:
                few["labels"] = labels[:1, :FEW]
            output = check_transform(self.model, self.transform, few)
            if "labels" in few:
                check_own_loss(base, output, targets_of(base, few["labels"]))
            self._transform_checked = True
        count = len(chosen) if num_items_in_batch is None else float(num_items_in_batch)
        scale = {"mean": 1 / max(count, 1), "sum": 1.0, "none": None}[reduction]
        if teacher_hidden is None:
            teacher_hidden = self._teacher.run(inputs)
        hook = None
        try:
            with contextlib.ExitStack() as stack:
                forward = stack.enter_context(head_as(self.model, self._stand_in))
                if asks:
                    self._family_loss = stack.enter_context(loss_as(base, self._loss_of_family))
                    inputs["labels"] = labels
                self._call = _Call(kept, chosen, scale, teacher_hidden, forward)
                hook = output_head(self.model).register_forward_hook(self._keep)
                yield inputs
        finally:
            if hook is not None:
                hook.remove()
            self._call = self._out = self._family_loss = None

    def _own_loss(self, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of the family's loss function: this loss, to which its forward may add."""
        if self._family_loss is not None and logits.shape[-1] != 1:  # of another head of the model
            return self._family_loss(logits, *args, **kwargs)
        return self._given(self._out).flatten()[0].clone()

    def _given(self, out: Tensor | None) -> Tensor:
        if out is None:
            raise RuntimeError(f"{type(self.model).__name__}.forward did not call its head")
        return out

    def _total(self, output: Any, out: Tensor | None) -> Tensor:
        """The loss with all that the family's forward added to it."""
        given, whole = self._given(out), loss_of(output)
        return given.flatten()[0] if whole is None else whole

    def from_hidden(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: nn.Module | None = None,
        teacher_hidden: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of hidden states `(n, D)` that are at hand already, and the tokens `(n,)` that follow them.

        `head` stands in for the model's; `teacher_hidden (n, Dt)` are the teacher's own.
        """
        self._teacher.check(teacher_hidden, tuple(labels.shape[:1]), runs=False)
        head = head or output_head(self.model)
        teacher = self._teacher.view(teacher_hidden, hidden.device)
        return self._weighted.total(head, head, hidden, labels, teacher, 1 / max(len(labels), 1))

    def token_statistics(
        self, hidden: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> TokenStatistics:
        """`log p(label)`, entropy and best token of the model's own distribution at hidden states `(…, D)`."""
        head = output_head(self.model)
        return token_statistics(head, hidden, labels, temperature, transform=self.transform)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The sum of every loss over the last call's labels, unweighted, by name."""
        return self._weighted.parts

    def _score(self, hidden: Tensor) -> Tensor:
        """In the place of the head: the loss, shaped `(B, T, 1)`, so that wrappers' hooks see a real output."""
        assert self._call is not None
        kept, labels, scale, teacher_hidden, forward = self._call
        if hidden.shape[:2] != kept.shape:
            raise ValueError(
                f"labels are {kept.shape[0]} × {kept.shape[1]}, the model's head sees "
                f"{' × '.join(map(str, hidden.shape[:2]))} hidden states"
            )
        x = hidden[kept]
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden[kept.to(teacher_hidden.device)]
        head, teacher = output_head(self.model), self._teacher.view(teacher_hidden, hidden.device)
        if scale is None:
            each = self._weighted.per_token(head, forward, x, labels, teacher)
            spread = widened(hidden.new_zeros(kept.shape)).masked_scatter(kept, each)
            return spread.unsqueeze(-1)
        total = self._weighted.total(head, forward, x, labels, teacher, scale)
        return total.repeat(*hidden.shape[:2], 1)  # a view would lose FSDP2's hook

    def _keep_output(self, _: nn.Module, __: Any, out: Tensor) -> None:
        """What the head gave after the hooks of wrappers: ZeRO-3 puts another tensor in its place."""
        self._out = out


def _weighted(losses: Any) -> dict[LossSpec, float]:
    if not isinstance(losses, Mapping):
        raise ValueError(
            f"losses are a dictionary with their weights, such as {{losses.KL(): 1.0}}, got {losses!r}"
        )
    for loss, weight in losses.items():
        if not isinstance(weight, Real):
            raise ValueError(f"the weight of the loss {loss!r} must be a number, got {weight!r}")
    return {spec_from_dict("loss", loss): float(weight) for loss, weight in losses.items()}


def _check_labels(chosen: Tensor, vocab: int) -> None:
    if not chosen.numel():
        return
    low, high = int(chosen.min()), int(chosen.max())
    if high >= vocab or (low < 0 and chosen.ndim == 1):
        raise ValueError(
            f"labels must be token ids from 0 to {vocab - 1}, or {IGNORE}; got {low} … {high}. Is the tokenizer "
            "another model's?"
        )


def _check_backend(name: str | None, losses: Mapping[LossSpec, float]) -> None:
    if name is None:
        return
    find_backend(name)
    if list(losses) != [CrossEntropy()]:
        listed = ", ".join(loss.name for loss in losses)
        raise ValueError(f"the backend {name!r} computes cross_entropy alone, not {listed}")


def _check_losses(losses: Mapping[LossSpec, float], teacher: Teacher, vocab: int) -> None:
    if not losses:
        raise ValueError("an Objective needs at least one loss, e.g. {losses.CrossEntropy(): 1.0}")
    for loss, weight in losses.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {loss.name} is {weight}")
    wanting = [loss.name for loss in losses if loss.needs_teacher]
    if teacher is None:
        if wanting:
            raise ValueError(
                f"{', '.join(wanting)} needs a teacher to compare with: pass teacher=, a dense matrix (V, D), a head "
                "module, or another model of the same vocabulary"
            )
        return
    if not wanting:
        names = ", ".join(loss.name for loss in losses)
        raise ValueError(f"a teacher is given but none of the losses ({names}) uses one")
    if any(isinstance(loss, HiddenLoss) for loss in losses) and not is_model(teacher):
        raise ValueError("hidden_mse compares with the hidden states of another model as teacher")
    if vocabulary(teacher) != vocab:
        raise ValueError(
            f"the teacher has {vocabulary(teacher)} tokens, the model {vocab}: distillation compares "
            "distributions over one vocabulary"
        )
