"""A hook on a head, or a forward of its own, counts exactly once in every number, or is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_softheads as sh
from hf_softheads.bridge import SplitModel
from hf_softheads.heads.base import HeadSpec
from hf_softheads.training.token_statistics import token_statistics

from .conftest import make_model


def own_forward(head: nn.Module, wrapper: Any = lambda _: lambda f: f) -> None:
    original = head.forward

    @wrapper(original)
    def forward(hidden: Tensor) -> Tensor:
        return original(hidden) * 0.25

    head.forward = forward


OUTPUT: dict[str, Callable[[nn.Module], Any]] = {
    "hook on the output": lambda head: head.register_forward_hook(lambda *a: a[2] * 0.25),
    "partial": lambda head: head.register_forward_hook(
        functools.partial(lambda by, *a: a[2] * by, 0.25)
    ),
}
OWN: dict[str, Callable[[nn.Module], Any]] = {
    "own forward": own_forward,
    "own forward, wrapped": lambda head: own_forward(head, functools.wraps),
}
INPUT: dict[str, Callable[[nn.Module], Any]] = {
    "hook on the input": lambda head: head.register_forward_pre_hook(lambda _, a: (a[0] * 0.25,)),
}
LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "looks": lambda head: head.register_forward_hook(lambda *_: None),
}
COMPOSED, STUDENT = {**OUTPUT, **OWN, **LOOKS}, {**OWN, **INPUT, **LOOKS}
EVERY = {**OUTPUT, **STUDENT}
SPECS: list[HeadSpec | None] = [None, sh.heads.Dense(), sh.heads.VQ(24), sh.heads.LowRank(8)]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: getattr(s, "name", "unpatched"))


def hooked(change: Callable[[nn.Module], Any], spec: HeadSpec | None, family: str = "llama") -> Any:
    model = make_model(family)
    if spec is not None:
        sh.patch(model, head=spec)
    change(model.lm_head)
    return model


def cross_entropy(model: Any, tokens: Tensor) -> float:
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@each_spec
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("change", COMPOSED.values(), ids=COMPOSED)
def test_two_steps_are_the_model(
    change: Any, family: str, spec: HeadSpec | None, tokens: Tensor
) -> None:
    model = hooked(change, spec, family)
    reader = SplitModel(model)
    hidden = reader.hidden(input_ids=tokens)
    torch.testing.assert_close(reader.logits(hidden), model(tokens).logits, rtol=1e-4, atol=1e-5)


@each_spec
def test_a_hook_on_the_input_is_refused(spec: HeadSpec | None, tokens: Tensor) -> None:
    """The hidden states that the head is handed would pass it twice."""
    model = hooked(INPUT["hook on the input"], spec)
    match = r"differ by .* from its head run by itself.* take the hook off"
    with pytest.raises(ValueError, match=match):
        sh.evaluate(model, tokens, window=12)
    goal = sh.Objective(make_model("llama", seed=1), {"kl": 1.0}, teacher=model)
    with pytest.raises(ValueError, match=match):
        goal(input_ids=tokens, labels=tokens)


@each_spec
@pytest.mark.parametrize("change", COMPOSED.values(), ids=COMPOSED)
def test_a_teacher(change: Any, spec: HeadSpec | None, tokens: Tensor) -> None:
    teacher, student = hooked(change, spec), make_model("llama", seed=1)
    theirs, own = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (teacher, student))
    wanted = F.kl_div(own, theirs, log_target=True, reduction="none").sum(-1).mean()
    for memory in (2**29, 2**12):  # whole logits, and blocks of both vocabularies where they can be
        goal = sh.Objective(student, {"kl": 1.0}, teacher=teacher, memory=memory)
        found = goal(input_ids=tokens, labels=tokens)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


@each_spec
@pytest.mark.parametrize("change", EVERY.values(), ids=EVERY)
def test_the_loss_of_a_model_s_own_forward(
    change: Any, spec: HeadSpec | None, tokens: Tensor
) -> None:
    model = hooked(change, spec)
    wanted = cross_entropy(model, tokens)
    assert model.train()(tokens, labels=tokens).loss.item() == pytest.approx(wanted, rel=1e-4)


@each_spec
@pytest.mark.parametrize("change", STUDENT.values(), ids=STUDENT)
def test_a_student(change: Any, spec: HeadSpec | None, tokens: Tensor) -> None:
    model = hooked(change, spec)
    wanted, goal = cross_entropy(model, tokens), sh.Objective(model, {"cross_entropy": 1.0})
    found = goal(input_ids=tokens, labels=tokens)
    assert found.item() == pytest.approx(wanted, rel=1e-4)
    each = goal(input_ids=tokens, labels=tokens, reduction="none")
    assert each.mean().item() == pytest.approx(wanted, rel=1e-4)


@each_spec
@pytest.mark.parametrize("change", OUTPUT.values(), ids=OUTPUT)
@pytest.mark.parametrize("embedded", [False, True])
def test_a_student_with_a_hook_on_its_output_is_refused(
    change: Any, embedded: bool, spec: HeadSpec | None, tokens: Tensor
) -> None:
    """The hook would be called on the loss."""
    model = hooked(change, spec)
    inputs = {"input_ids": tokens}
    if embedded:
        inputs = {"inputs_embeds": model.get_input_embeddings()(tokens)}
    with pytest.raises(ValueError, match="a hook on the head counts too"):
        sh.Objective(model, {"cross_entropy": 1.0})(**inputs, labels=tokens)


@each_spec
@pytest.mark.parametrize("change", COMPOSED.values(), ids=COMPOSED)
def test_hidden_states_that_are_at_hand(change: Any, spec: HeadSpec | None, tokens: Tensor) -> None:
    model = hooked(change, spec)
    hidden = SplitModel(model).hidden(input_ids=tokens)[:, :-1].flatten(0, 1)
    labels, wanted = tokens[:, 1:].flatten(), cross_entropy(model, tokens)
    found = sh.Objective(model, {"cross_entropy": 1.0}).from_hidden(hidden, labels)
    assert found.item() == pytest.approx(wanted, rel=1e-4)
    found = -token_statistics(model.lm_head, hidden, labels).log_prob.mean()
    assert found.item() == pytest.approx(wanted, rel=1e-4)
