"""The teacher of an Objective: where its hidden states come from and what its head makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_softheads.bridge import SplitModel, output_head
from hf_softheads.heads.base import Head, LogitTransform
from hf_softheads.training.dispatch import View, as_matrix
from hf_softheads.training.token_chunks import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Teacher = Tensor | nn.Module | None


def is_model(teacher: Teacher) -> TypeGuard[PreTrainedModel]:
    """Is the teacher a whole model, with hidden states of its own?"""
    from transformers import PreTrainedModel

    return isinstance(teacher, PreTrainedModel)


class TeacherSide:
    """The teacher as the losses see it.

    Args:
        teacher: a matrix `(V, D)` or a head module, for the student's hidden states or for given ones; or a model.
        student: the model that learns.
        transform: what the student's family does to its scores.

    Raises:
        ValueError: a model as teacher changes its logits in a way that is not understood.
    """

    def __init__(self, teacher: Teacher, student: nn.Module, transform: LogitTransform):
        self.teacher, self.student, self._of_student = teacher, student, transform
        self.reader = SplitModel(teacher) if is_model(teacher) else None

    def check(self, hidden: Tensor | None, shape: tuple[int, ...], *, runs: bool) -> None:
        """Raise ValueError unless the hidden states of the teacher that a call gives are those that it needs.

        `shape`: of the labels; `runs`: a teacher that is a model can make its own.
        """
        if self.teacher is None:
            if hidden is not None:
                raise ValueError(
                    "teacher_hidden is given, but this Objective has no teacher: pass Objective(…, teacher=…), the "
                    "head that these hidden states go to"
                )
            return
        width = _width(self.teacher if self.reader is None else self.reader.head)
        if hidden is not None:
            expected = (*shape, width)
            if hidden.shape != expected:
                raise ValueError(
                    f"teacher_hidden is {_sizes(hidden.shape)}, but the labels are {_sizes(shape)} and the teacher's "
                    f"head takes states of width {width}: it must be {_sizes(expected)}"
                )
            return
        own = _width(output_head(self.student))
        if self.reader is not None and not runs:
            raise ValueError(
                "the teacher is a model, and there are no tokens to run it on: pass teacher_hidden, its hidden states"
            )
        if self.reader is None and width != own:
            raise ValueError(
                f"the teacher's head takes states of width {width}, the model's are {own} wide: pass teacher_hidden, "
                f"its own states ({_sizes((*shape, width))}), or the whole model as teacher"
            )

    @torch.no_grad()
    def run(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Its hidden states `(B, T, Dt)`, where it is a model."""
        if self.reader is None:
            return None
        teacher = self.reader.model
        training = teacher.training
        teacher.eval()
        try:
            return self.reader.hidden(**{k: v for k, v in batch.items() if k != "use_cache"})
        finally:
            teacher.train(training)

    @torch.no_grad()
    def view(self, hidden: Tensor | None, device: torch.device) -> View:
        """For its own hidden states `(n, Dt)`, or None for the student's, which are on `device`."""
        head, transform = self._head, self._of_student
        if hidden is not None:
            transform = self._transform
            weight = head if isinstance(head, Tensor) else head.weight
            hidden = hidden.to(device if isinstance(head, Tensor) else weight.device)
            matrix = as_matrix(head, transform) is not None
            if matrix and not torch.is_autocast_enabled(hidden.device.type):
                hidden = hidden.to(weight.dtype)
        return View(self._scores, transform, hidden, _in_reach(head, transform))

    @property
    def _head(self) -> Any:
        """A matrix, in one piece, or a module."""
        if self.reader is not None:
            return self.reader.head
        gather = getattr(self.teacher, "full_tensor", None)  # a sharded matrix
        return self.teacher if gather is None else gather()

    @property
    def _transform(self) -> LogitTransform:
        """What its own family does to its scores."""
        if self.reader is not None:
            return self.reader.transform
        if not isinstance(self.teacher, Head):
            return LogitTransform()
        if self.teacher.transform is None:
            raise ValueError(
                f"the family of this {type(self.teacher).__name__} does something unknown to its scores; its "
                "distribution cannot be computed from hidden states"
            )
        return self.teacher.transform

    @torch.no_grad()
    def _scores(self, hidden: Tensor, of_teacher: Tensor | None) -> Tensor | None:
        """From the student's hidden states, or from its own."""
        head, states = self._head, hidden if of_teacher is None else of_teacher
        if head is None:
            return None
        if isinstance(head, Tensor):
            return F.linear(states, head.to(states.device, states.dtype))
        return head(states).to(hidden.device)  # type: ignore[no-any-return]


def _in_reach(head: Any, transform: LogitTransform) -> Scorer | None:
    """As `as_matrix`; None also for a module whose forward or weight is not its own: hooked, offloaded, sharded."""
    if isinstance(head, nn.Module):
        hooks = head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__
        sharded = hasattr(head.weight, "full_tensor") or hasattr(head.weight, "ds_shape")
        if hooks or sharded:
            return None
    return as_matrix(head, transform)


def _width(head: Any) -> int:
    """Of the hidden states that a matrix or a head module takes."""
    if isinstance(head, Tensor):
        return head.shape[-1]
    return getattr(head, "in_features", None) or head.weight.shape[-1]  # type: ignore[no-any-return]


def _sizes(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
