"""An Objective as the loss of a model's own training calls."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_softheads.bridge import without_logits
from hf_softheads.losses.base import LossSpec
from hf_softheads.losses.cross_entropy import CrossEntropy
from hf_softheads.training.objective import Objective
from hf_softheads.training.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trainer_loss(
    model: PreTrainedModel,
    losses: Mapping[LossSpec | str, float] | None = None,
    teacher: Teacher = None,
) -> TrainerLoss:
    """Let `transformers.Trainer` (and anything else that calls `model(**batch, labels=…)`) train with an Objective.

    In training mode the model's forward then returns this loss and no logits; in evaluation mode nothing changes.
    `losses` default to cross-entropy. Returns the Objective, whose `remove()` ends this; the model gets two hooks and
    nothing else.
    """
    return TrainerLoss(model, losses or {CrossEntropy(): 1.0}, teacher)


class TrainerLoss(Objective):
    """An Objective that computes the loss of every training call of its model that has labels; see `trainer_loss`."""

    def __init__(
        self, model: nn.Module, losses: Mapping[LossSpec | str, float], teacher: Teacher = None
    ):
        super().__init__(model, losses, teacher)
        self._running: contextlib.ExitStack | None = None
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks off: the model computes its own loss again."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args or kwargs.get("labels") is None or not module.training:
            return None
        batch = {"use_cache": False, **kwargs}
        labels, items = batch.pop("labels"), batch.pop("num_items_in_batch", None)
        theirs = batch.pop("teacher_hidden", None)
        running = contextlib.ExitStack()
        inputs = running.enter_context(
            self._instead_of_logits(labels, batch, items, "mean", theirs)
        )
        self._running = running
        return args, inputs

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._running is None:
            return None
        running, self._running = self._running, None
        with running:
            if output is None:  # the forward has failed
                return None
            return without_logits(output, self._total(output, self._out))
