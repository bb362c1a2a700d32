"""Distillation between two dense heads, walked in blocks of both, against the plain definition on whole logits."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hf_softheads as sh
import hf_softheads.losses as L
from hf_softheads.heads import VQ, Dense
from hf_softheads.heads.base import LogitTransform
from hf_softheads.training import dispatch
from hf_softheads.training.objective import Objective
from hf_softheads.training.token_chunks import Scorer
from hf_softheads.training.trainer_loss import trainer_loss

V, D, DT = 211, 32, 20
SIZES = {
    "vocab_size": V,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
PLAIN = LogitTransform()
SCALE = LogitTransform((("mul", 0.3),))
CAP = LogitTransform((("div", 2.0), ("tanh", 1.0), ("mul", 2.0)))
LOSSES = [
    loss
    for t in (1.0, 2.5)
    for loss in (
        L.KL(temperature=t),
        L.ReverseKL(temperature=t),
        L.JSD(temperature=t),
        L.JSD(beta=0.1, temperature=t),
    )
]
MIX: dict[Any, float] = {
    L.KL(): 1.0,
    L.KL(temperature=2.0): 0.3,
    L.ReverseKL(): -0.5,
    L.JSD(temperature=2.0): 2.0,
    L.CrossEntropy(): 0.7,
    L.ZLoss(): 0.1,
    L.LabelSmoothing(0.2): 0.3,
}


def defined(loss: Any, z: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    """The formulas of the distillation losses from logits, written down once more."""
    if isinstance(loss, L.KL | L.ReverseKL | L.JSD):
        p, q = ((x / loss.temperature).log_softmax(-1) for x in (z, t))

        def kl(a: Tensor, b: Tensor) -> Tensor:
            return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

        if isinstance(loss, L.JSD):
            m = torch.stack([q + math.log(loss.beta), p + math.log(1 - loss.beta)]).logsumexp(0)
            value = loss.beta * kl(q, m) + (1 - loss.beta) * kl(p, m)
        else:
            value = kl(q, p) if isinstance(loss, L.KL) else kl(p, q)
        return loss.temperature**2 * value
    return loss.per_token(z, labels, t)  # type: ignore[no-any-return]


class Sample(NamedTuple):
    """A student's and a teacher's head, their hidden states, and labels."""

    head: Any
    teacher: Any
    hidden: Tensor
    theirs: Tensor
    labels: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """What gets gradients."""
        found = [self.hidden, self.head.weight, self.head.bias]
        return [x for x in found if x is not None]

    def per_token(self, losses: Mapping[Any, float]) -> Tensor:
        """The definition, from whole logits in the dtype of the sample, or in float32 if that is half."""
        z, t = (
            head.transform(wide(F.linear(h, head.weight, head.bias)))
            for head, h in ((self.head, self.hidden), (self.teacher, self.theirs.detach()))
        )
        each = [w * defined(loss, z, self.labels, t.detach()) for loss, w in losses.items()]
        return torch.stack(each).sum(0)

    def to(self, dtype: torch.dtype) -> Sample:
        heads = []
        for old in (self.head, self.teacher):
            new = Dense().module(old.in_features, old.out_features, bias=old.bias is not None)
            new.load_state_dict(old.state_dict())
            new.transform = old.transform
            heads.append(new.to(dtype))
        hidden = self.hidden.detach().to(dtype).requires_grad_()
        return Sample(*heads, hidden, self.theirs.to(dtype), self.labels)

    def objective(self, losses: Mapping[Any, float], memory: int) -> Objective:
        model = bare(self.head)
        return Objective(model, losses, self.teacher, memory=memory)

    def ours(self, losses: Mapping[Any, float], memory: int = 0) -> Tensor:
        goal = self.objective(losses, memory)
        return goal.from_hidden(self.hidden, self.labels, teacher_hidden=self.theirs)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def bare(head: nn.Module) -> LlamaForCausalLM:
    """A model of which only the head is used."""
    sizes = {**SIZES, "vocab_size": head.out_features, "num_attention_heads": 1}
    sizes.update(num_hidden_layers=1, num_key_value_heads=1)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, hidden_size=head.in_features))
    model.set_output_embeddings(head)
    return model


def sample(
    transforms: tuple[LogitTransform, LogitTransform] = (PLAIN, PLAIN),
    *,
    bias: bool = True,
    tokens: int = 23,
    vocab: int = V,
    sizes: tuple[int, int] = (D, DT),
    spread: float = 1.0,
) -> Sample:
    g = torch.Generator().manual_seed(0)
    heads = []
    for size, transform in zip(sizes, transforms, strict=True):
        head = Dense().module(size, vocab, bias=bias).double()
        head.transform = transform
        with torch.no_grad():
            head.weight.copy_(torch.randn(vocab, size, generator=g) * spread * 2 * size**-0.5)
            if head.bias is not None:
                head.bias.copy_(torch.randn(vocab, generator=g))  # type: ignore[operator]
        heads.append(head)
    hidden, theirs = (torch.randn(tokens, size, generator=g).double() for size in sizes)
    labels = torch.randint(vocab, (tokens,), generator=g)
    return Sample(*heads, hidden.requires_grad_(), theirs, labels)


@pytest.fixture
def only_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where whole rows of logits are made."""

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("this walked over chunks of tokens with all their logits")

    monkeypatch.setattr(dispatch, "chunks", refuse)
    monkeypatch.setattr(dispatch, "checkpoint", refuse)


# -- value and gradients -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_blocks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "transforms", [(PLAIN, PLAIN), (SCALE, CAP), (CAP, SCALE)], ids=["plain", "scale", "cap"]
)
@pytest.mark.parametrize("loss", [*LOSSES, None], ids=lambda k: "mix" if k is None else k.short())
def test_equals_the_definition(loss: Any, transforms: Any, bias: bool) -> None:
    """In float64, for blocks of 64 tokens and of more, kept or not."""
    case = sample(transforms, bias=bias)
    losses = MIX if loss is None else {loss: 1.5}
    expected = case.per_token(losses).mean()
    wanted = torch.autograd.grad(expected, case.inputs)
    whole = 23 * V * 16
    for memory in (0, whole // 4, whole // 2 - 16 * V):
        value = case.ours(losses, memory)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(value, case.inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)
    assert case.teacher.weight.grad is None


@pytest.mark.parametrize("loss", LOSSES, ids=lambda k: k.short())
def test_per_token_is_the_definition(loss: Any) -> None:
    g = torch.Generator().manual_seed(1)
    z, t = (torch.randn(7, 31, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.zeros(7, dtype=torch.long)
    torch.testing.assert_close(loss.per_token(z, labels, t), defined(loss, z, labels, t))


@pytest.mark.usefixtures("only_blocks")
@pytest.mark.parametrize("loss", [L.KL(2.0), L.ReverseKL(), L.JSD(0.3)], ids=lambda k: k.short())
def test_gradients_of_every_token(loss: Any) -> None:
    """Per token, by finite differences; they can be taken again."""
    case = sample((CAP, SCALE), tokens=5, sizes=(3, 4), vocab=70)
    model = bare(case.head)
    weighted = Objective(model, {loss: 1.0, L.CrossEntropy(): 0.5}, case.teacher, memory=0)

    def each(hidden: Tensor, *_: Tensor) -> Tensor:
        view = weighted._teacher.view(case.theirs, hidden.device)
        head = case.head
        return weighted._weighted.per_token(head, head.forward, hidden, case.labels, view)

    assert torch.autograd.gradcheck(each, tuple(case.inputs), fast_mode=True)
    out = each(*case.inputs).sum()
    first = torch.autograd.grad(out, case.inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out, case.inputs), first)


@pytest.mark.usefixtures("only_blocks")
def test_a_frozen_head_trains_the_body_alone() -> None:
    case = sample()
    expected = torch.autograd.grad(case.per_token({L.JSD(): 1.0}).mean(), case.hidden)
    case.head.requires_grad_(False)
    value = case.ours({L.JSD(): 1.0})
    torch.testing.assert_close(torch.autograd.grad(value, case.hidden), expected)


@pytest.mark.usefixtures("only_blocks")
@pytest.mark.parametrize("losses", [{L.KL(): 1.0}, {L.ReverseKL(): 1.0}, {L.JSD(): 1.0}], ids=str)
def test_large_scores_and_rising_maxima(losses: Any) -> None:
    """Student and teacher apart by a constant of 1,000, the largest scores in the last block: float32 as eager."""
    case = sample(spread=3.0)
    with torch.no_grad():
        case.head.bias.add_(torch.linspace(-1, 40, V))
        case.teacher.bias.add_(torch.linspace(1000, 1050, V))
    exact = case.per_token(losses).mean()
    wanted = torch.autograd.grad(exact, case.inputs)
    single = case.to(torch.float32)
    check_as_good_as_eager(single, losses, exact, wanted, floor=2**-21)


@pytest.mark.usefixtures("only_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "transforms", [(PLAIN, PLAIN), (SCALE, CAP), (CAP, SCALE)], ids=["plain", "scale", "cap"]
)
@pytest.mark.parametrize(
    "losses",
    [{L.KL(): 1.0}, {L.ReverseKL(2.0): 1.0}, {L.JSD(): 1.0}, MIX],
    ids=["kl", "reverse_kl", "jsd", "mix"],
)
def test_as_good_as_eager(losses: Any, transforms: Any, dtype: torch.dtype) -> None:
    """Error to float64 at most twice that of eager in the same dtype, for the value and every gradient."""
    rounded = sample(transforms, tokens=150, sizes=(64, 96)).to(dtype)
    exact_case = rounded.to(torch.float64)
    exact = exact_case.per_token(losses).mean()
    wanted = torch.autograd.grad(exact, exact_case.inputs)
    # of a sum's rounding: the last bit of float32, or of the gradients' own dtype
    check_as_good_as_eager(rounded, losses, exact, wanted, floor=torch.finfo(dtype).eps)


def check_as_good_as_eager(
    case: Sample, losses: Any, exact: Tensor, wanted: Any, floor: float
) -> None:
    plain = case.per_token(losses).mean()
    theirs = torch.autograd.grad(plain, case.inputs)
    scores = len(case.labels) * len(case.head.weight) * case.hidden.element_size()
    for memory in (0, scores // 2):
        value = case.ours(losses, memory)
        assert value.dtype == torch.float32
        error, error_of_eager = ((x.double() - exact).detach().abs() for x in (value, plain))
        assert error <= 2 * error_of_eager + floor * exact.detach().abs()
        for mine, eager, exactly in zip(
            torch.autograd.grad(value, case.inputs), theirs, wanted, strict=True
        ):
            error_of_eager = (eager.double() - exactly).norm()
            limit = 2 * error_of_eager + floor * exactly.norm()
            assert (mine.double() - exactly).norm() <= limit


def test_half_precision_sums_in_float32() -> None:
    """Hundreds of blocks: a sum in bfloat16 would lose the gradient of the hidden states."""
    rounded = sample(vocab=20_000, tokens=8).to(torch.bfloat16)
    exact_case = rounded.to(torch.float64)
    exact = exact_case.per_token({L.KL(): 1.0}).mean()
    wanted = torch.autograd.grad(exact, exact_case.inputs)
    check_as_good_as_eager(rounded, {L.KL(): 1.0}, exact, wanted, floor=2**-8)


# -- work and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "walks"),
    [({L.KL(): 1.0}, 2), ({L.ReverseKL(): 1.0, L.CrossEntropy(): 1.0}, 2), ({L.JSD(): 1.0}, 3)],
    ids=str,
)
def test_how_often_scores_are_computed(
    losses: Any, walks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both heads' blocks once for each walk, or once alone where the memory keeps them."""
    case, block = sample(tokens=40), Scorer.block
    columns: list[int] = []

    def counted(head: Scorer, x: Tensor, start: int, stop: int) -> Tensor:
        columns.append(stop - start)
        return block(head, x, start, stop)

    monkeypatch.setattr(Scorer, "block", counted)
    case.ours(losses)
    assert sum(columns) == 2 * walks * V
    columns.clear()
    pair = 16 * 40 * 64  # bytes of a block of both heads
    monkeypatch.setattr(dispatch.WeightedLosses, "_block", lambda *_: (64 * 40, pair))
    case.ours(losses)
    assert sum(columns) == 2 * (64 + walks * (V - 64))


def test_scores_that_fit_are_computed_in_chunks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = sample()
    seen: list[bool] = []
    walk = dispatch.blocks
    monkeypatch.setattr(dispatch, "blocks", lambda *a, **k: (seen.append(True), walk(*a, **k))[1])
    within = case.ours({L.KL(): 1.0}, 23 * V * 16)
    assert not seen
    torch.testing.assert_close(case.ours({L.KL(): 1.0}, 23 * V * 2), within)
    assert seen


class Live(TorchDispatchMode):
    """Bytes of the largest tensor, and of all tensors alive at once, that operations returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self._seen: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._seen.append(weakref.ref(leaf))
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        alive = [(ref, x.untyped_storage()) for ref in self._seen if (x := ref()) is not None]
        self._seen = [ref for ref, _ in alive]
        storages = {storage.data_ptr(): storage.nbytes() for _, storage in alive}
        self.peak = max(self.peak, sum(storages.values()))
        return out


@pytest.mark.parametrize("per_token", [False, True], ids=["mean", "none"])
@pytest.mark.parametrize(
    "losses",
    [{L.KL(): 1.0, L.CrossEntropy(): 1.0}, {L.ReverseKL(2.0): 1.0}, {L.JSD(): 1.0}],
    ids=str,
)
def test_never_holds_the_logits_of_either(losses: Any, per_token: bool) -> None:
    """Beside the gradients no more than the memory granted, and the tile of the element-wise work."""
    tokens, vocab, memory = 512, 16_000, 2**21
    case = sample(tokens=tokens, vocab=vocab, sizes=(8, 12), bias=False).to(torch.float32)
    goal = case.objective(losses, memory)
    scores = tokens * vocab * 4  # bytes of one head's
    gradients = 4 * (vocab + 2 * tokens) * 8
    tile = 4 * 2**19 // 4
    with Live() as live:
        if per_token:
            view = goal._teacher.view(case.theirs, case.hidden.device)
            head = case.head
            each = goal._weighted.per_token(head, head.forward, case.hidden, case.labels, view)
            each.mean().backward()
        else:
            goal.from_hidden(case.hidden, case.labels, teacher_hidden=case.theirs).backward()
    assert live.largest <= max(memory, gradients)
    assert live.peak <= memory + 2 * gradients + 12 * tile < scores / 2
    assert live.peak > memory / 2  # it was seen


# -- in a model --------------------------------------------------------------------------------------------------------


def student(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES, hidden_size=D, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager"
    )
    return spread(Gemma2ForCausalLM(config)).to(dtype).train()


def teacher_model(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Of another family and width."""
    torch.manual_seed(1)
    config = GraniteConfig(**SIZES, hidden_size=24, logits_scaling=0.5)
    return spread(GraniteForCausalLM(config)).to(dtype)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(1, V, (3, 13), generator=g)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 4:7] = -100
    labels[-1, -2:] = -100
    mask[-1, -2:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the body hands to the head."""
    forward = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        return model.eval().base_model(**forward).last_hidden_state  # type: ignore[no-any-return]


def of_whole_logits(
    model: Any, losses: Mapping[Any, float], inputs: Mapping[str, Tensor], t: Tensor
) -> Tensor:
    """Per kept token."""
    forward = {k: v for k, v in inputs.items() if k != "labels"}
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    z, t = model(**forward).logits[:, :-1][kept], t[:, :-1][kept]
    return torch.stack([w * defined(k, z, labels[kept], t) for k, w in losses.items()]).sum(0)


HOW: dict[str, Callable[[Any, Mapping[str, Tensor]], tuple[Any, dict[str, Tensor]]]] = {
    "a model": lambda m, inputs: (m, {}),
    "a model, its states given": lambda m, inputs: (m, {"teacher_hidden": states(m, inputs)}),
    "a head": lambda m, inputs: (dense_of(m), {"teacher_hidden": states(m, inputs)}),
    "a linear layer": lambda m, inputs: (plain(m), {"teacher_hidden": states(m, inputs)}),
    "a matrix": lambda m, inputs: (plain(m).weight, {"teacher_hidden": states(m, inputs)}),
}


def dense_of(model: Any) -> nn.Module:
    """Its head by itself, with what the family does to the scores."""
    head = Dense().module(24, V).to(model.dtype)
    Dense().fit(head, model.lm_head.weight, None, None)
    head.transform = LogitTransform((("div", 0.5),))
    return head


def plain(model: Any) -> nn.Linear:
    """A linear layer that includes the scale."""
    head = nn.Linear(24, V, bias=False).to(model.dtype)
    head.weight = nn.Parameter(model.lm_head.weight.detach() / 0.5)
    return head


@pytest.mark.usefixtures("only_blocks")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("losses", [{L.KL(2.0): 1.0}, MIX], ids=["kl", "mix"])
def test_a_teacher_of_another_width(losses: Any, how: str) -> None:
    model, other, inputs = student(), teacher_model(), batch()
    teacher, given = HOW[how](other, inputs)
    forward = {k: v for k, v in inputs.items() if k != "labels"}
    t = other.eval()(**forward).logits.detach()
    each = of_whole_logits(model, losses, inputs, t)
    each.mean().backward()
    wanted = gradients(model)
    goal = Objective(model, losses, teacher, memory=0)
    # the families' norms and rotations round to float32 in any dtype
    close = {"rtol": 1e-5, "atol": 1e-7}
    value = goal(**inputs, **given)
    value.backward()
    torch.testing.assert_close(value, each.mean(), **close)
    torch.testing.assert_close(gradients(model), wanted, **close)
    first = next(iter(losses))
    torch.testing.assert_close(
        goal.parts[first.name],
        sum(  # type: ignore[arg-type]
            of_whole_logits(model, {k: 1.0}, inputs, t).sum().detach()
            for k in losses
            if k.name == first.name
        ),
        **close,
    )
    goal(**inputs, **given, num_items_in_batch=len(each) * 2).backward()
    torch.testing.assert_close(gradients(model), {k: g / 2 for k, g in wanted.items()}, **close)
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.usefixtures("only_blocks")
def test_a_value_for_every_token() -> None:
    model, other, inputs = student(), teacher_model(), batch()
    forward = {k: v for k, v in inputs.items() if k != "labels"}
    t = other.eval()(**forward).logits.detach()
    weights = torch.linspace(-1, 2, 36, dtype=torch.float64).view(3, 12)
    kept = inputs["labels"][:, 1:] != -100
    each = of_whole_logits(model, MIX, inputs, t)
    (each * weights[kept]).sum().backward()
    wanted = gradients(model)
    value = Objective(model, MIX, other, memory=0)(**inputs, reduction="none")
    assert value.shape == (3, 12)
    assert (value[~kept] == 0).all()
    close = {"rtol": 1e-5, "atol": 1e-7}  # as above
    torch.testing.assert_close(value[kept], each, **close)
    (value * weights).sum().backward()
    torch.testing.assert_close(gradients(model), wanted, **close)


def test_masked_positions_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, inputs = student(), teacher_model(), batch()
    rows: set[int] = set()
    block = Scorer.block

    def seen(head: Scorer, x: Tensor, start: int, stop: int) -> Tensor:
        rows.add(len(x))
        return block(head, x, start, stop)

    monkeypatch.setattr(Scorer, "block", seen)
    theirs = states(other, inputs)
    theirs[:, :-1][inputs["labels"][:, 1:] == -100] = torch.nan
    theirs[:, -1] = torch.nan
    value = Objective(model, {"kl": 1.0}, other, memory=0)(**inputs, teacher_hidden=theirs)
    assert value.isfinite()
    assert rows == {int((inputs["labels"][:, 1:] != -100).sum())}


def test_given_states_spare_the_teachers_body(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, inputs = student(), teacher_model(), batch()
    theirs = states(other, inputs)
    monkeypatch.setattr(type(other.model), "forward", None)
    assert Objective(model, {"kl": 1.0}, other)(**inputs, teacher_hidden=theirs).isfinite()


def test_states_of_another_dtype_go_to_the_heads() -> None:
    """Stored states may be narrower or wider than the teacher's head."""
    model, other, inputs = student(torch.float32), teacher_model(torch.float32), batch()
    theirs = states(other, inputs)
    for memory in (0, 10**7):
        goal = Objective(model, {"kl": 1.0}, plain(other), memory=memory)
        value = goal(**inputs, teacher_hidden=theirs)
        torch.testing.assert_close(goal(**inputs, teacher_hidden=theirs.double()), value)


def test_other_heads_keep_the_walk_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A structured head on either side, and a teacher's whose forward is not its own."""
    monkeypatch.setattr(dispatch, "Divergences", None)
    inputs, losses = batch(), {L.KL(): 1.0}
    cases = []
    model, other = student(torch.float32), teacher_model(torch.float32)
    sh.patch(other, head=VQ(codes=20))
    cases.append((model, other, other))
    model, other = student(torch.float32), teacher_model(torch.float32)
    sh.patch(model, head=VQ(codes=20))
    cases.append((model, other, other))
    model, other = student(torch.float32), teacher_model(torch.float32)
    weight = other.lm_head.weight.detach().clone()
    other.lm_head.forward = lambda hidden: F.linear(hidden, 2 * weight)
    cases.append((model, other, other))
    for model, other, teacher in cases:
        forward = {k: v for k, v in inputs.items() if k != "labels"}
        t = other.eval()(**forward).logits.detach()
        expected = of_whole_logits(model, losses, inputs, t).mean()
        value = Objective(model, losses, teacher, memory=0)(**inputs)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_evaluation_without_gradients() -> None:
    case = sample()
    for losses in ({L.KL(): 1.0}, MIX):
        with torch.no_grad():
            torch.testing.assert_close(case.ours(losses), case.per_token(losses).mean())


def test_the_trainers_batch_may_bring_states() -> None:
    model, other, inputs = student(), teacher_model(), batch()
    theirs = states(other, inputs)
    expected = Objective(model, {"kl": 1.0}, other)(**inputs, teacher_hidden=theirs)
    trainer_loss(model, {"kl": 1.0}, plain(other))
    torch.testing.assert_close(model(**inputs, teacher_hidden=theirs).loss, expected)


@pytest.mark.parametrize(
    ("teacher", "given", "message"),
    [
        (torch.zeros(V + 1, 24), torch.zeros(3, 13, 24), f"the teacher has {V + 1} tokens, the"),
        (torch.zeros(V, 24), None, "takes states of width 24, the model's are 32 wide: pass"),
        (nn.Linear(24, V), None, "takes states of width 24, the model's are 32 wide: pass"),
        (torch.zeros(V, 24), torch.zeros(3, 13, 32), "is 3 × 13 × 32, .* must be 3 × 13 × 24"),
        (torch.zeros(V, D), torch.zeros(3, 12, D), "is 3 × 12 × 32, .* must be 3 × 13 × 32"),
        (torch.zeros(V, 24), torch.zeros(39, 24), "is 39 × 24, .* must be 3 × 13 × 24"),
        (None, torch.zeros(3, 13, 24), "this Objective has no teacher"),
    ],
)
def test_wrong_input_is_refused(teacher: Any, given: Any, message: str) -> None:
    losses = {"cross_entropy" if teacher is None else "kl": 1.0}
    model = student(torch.float32)

    def run() -> None:
        goal = Objective(model, losses, teacher)
        model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
        goal(**batch(), teacher_hidden=given)

    with pytest.raises(ValueError, match=message):
        run()


def test_no_tokens_to_run_the_teacher_on() -> None:
    case, other = sample(), teacher_model()
    goal = Objective(bare(case.head), {"kl": 1.0}, other)
    with pytest.raises(ValueError, match="pass teacher_hidden, its hidden states"):
        goal.from_hidden(case.hidden, case.labels)
