"""The Objective against whole logits and eager autograd: value, every gradient, for any family, head and wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

import hf_softheads as sh
import hf_softheads.losses as L
from hf_softheads.heads import VQ, Dense
from hf_softheads.heads.base import Head, LogitTransform
from hf_softheads.losses.base import LossSpec
from hf_softheads.training.objective import Objective
from hf_softheads.training.token_chunks import Scorer
from hf_softheads.training.trainer_loss import trainer_loss
from hf_softheads.training.vocab_blocks import blocks

V, D = 97, 32
TOLERANCE = {
    "rtol": 1e-5,
    "atol": 1e-7,
}  # the families' norms and rotations round to float32 in any dtype
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gemma2_soft_cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
    ),
    "granite_scaled": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "cohere_scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=D, n_layer=2, n_head=4, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
        )
    ),
    "phi_bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
}
MIXES: dict[str, dict[LossSpec | str, float]] = {
    "cross_entropy": {"cross_entropy": 1.0},
    "summary": {L.CrossEntropy(): 0.5, L.ZLoss(): 0.1, L.LabelSmoothing(0.2): 0.3},
    "gram": {L.SphericalZ(b=1.0): 2.0},
    "summary_and_moments": {L.SphericalZ(): 1.0, L.CrossEntropy(): 1.0},
    "logits": {L.Entmax15(): 1.0, L.CrossEntropy(): 0.5},
    "distilled": {L.KL(): 1.0, L.ReverseKL(): 0.2, L.CrossEntropy(): 0.5},
}


def build(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def batch(rows: int = 3, length: int = 13) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, V, (rows, length), generator=g)
    labels = ids.clone()
    labels[0, 4:7] = -100
    labels[-1, :9] = -100
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    labels[-1, -2:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def last_hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.base_model(**inputs).last_hidden_state


def eager(
    model: Any, losses: dict[Any, float], inputs: dict[str, Tensor], teacher: Tensor | None = None
) -> Tensor:
    """The plain definition, from whole logits; per kept token."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[:, 1:]
    kept = labels != -100
    logits = model(**inputs).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    z, y = wide[:, :-1][kept], labels[kept]
    t = None
    if teacher is not None:
        goal = Objective(model, losses, teacher)
        t = goal.transform(F.linear(last_hidden(model, inputs)[:, :-1][kept].detach(), teacher))
    specs = {L.CrossEntropy() if k == "cross_entropy" else k: w for k, w in losses.items()}
    return sum(w * spec.per_token(z, y, t) for spec, w in specs.items())  # type: ignore[return-value]


def teacher_for(losses: dict[Any, float]) -> Tensor | None:
    if not any(getattr(k, "needs_teacher", False) for k in losses):
        return None
    return torch.randn(V, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_for_every_family(family: str, mix: str) -> None:
    model, inputs, losses = build(family), batch(), MIXES[mix]
    teacher = teacher_for(losses)
    expected = eager(model, losses, inputs, teacher).mean()
    expected.backward()
    wanted = gradients(model)
    for memory in (1200, 10**7):
        goal = Objective(model, losses, teacher, memory=memory)
        value = goal(**inputs)
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients(model), wanted, **TOLERANCE)


@pytest.mark.parametrize(
    "steps", [(), (("mul", 0.3),), (("div", 2.0), ("tanh", 1.0), ("mul", 2.0))]
)
@pytest.mark.parametrize("mix", MIXES)
def test_hidden_states_at_hand_in_full_precision(mix: str, steps: Any) -> None:
    """The chunked sums alone: float64 agreement to rounding, whatever the chunk."""
    g = torch.Generator().manual_seed(4)
    model, losses = build("llama"), MIXES[mix]
    head = Dense().module(D, V, bias=True).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=g))
        head.bias.copy_(torch.randn(V, generator=g))  # type: ignore[union-attr]
    head.transform = LogitTransform(steps)
    model.set_output_embeddings(head)
    hidden = torch.randn(23, D, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (23,), generator=g)
    teacher = teacher_for(losses)
    z = head.transform(F.linear(hidden, head.weight, head.bias))
    t = None if teacher is None else head.transform(F.linear(hidden.detach(), teacher))
    specs = {L.CrossEntropy() if k == "cross_entropy" else k: w for k, w in losses.items()}
    expected = torch.stack(
        [w * spec.per_token(z, labels, t).mean() for spec, w in specs.items()]
    ).sum()
    inputs = [hidden, head.weight, head.bias]
    wanted = torch.autograd.grad(expected, inputs)
    for memory in (8 * V, 8 * (4 * V + 1), 10**7):
        value = Objective(model, losses, teacher, memory=memory).from_hidden(hidden, labels)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(value, inputs), wanted, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("family", ["llama", "gemma2_soft_cap", "phi_bias"])
@pytest.mark.parametrize("mix", ["cross_entropy", "distilled"])
def test_per_token_losses_and_their_gradients(family: str, mix: str) -> None:
    model, inputs, losses = build(family), batch(), MIXES[mix]
    teacher = teacher_for(losses)
    weights = torch.linspace(-1, 2, 3 * 12, dtype=torch.float64).view(3, 12)
    kept = inputs["labels"][:, 1:] != -100
    expected = eager(model, losses, inputs, teacher)
    (expected * weights[kept]).sum().backward()
    wanted = gradients(model)
    value = Objective(model, losses, teacher, memory=40 * V)(**inputs, reduction="none")
    assert value.shape == (3, 12)
    assert (value[~kept] == 0).all()
    torch.testing.assert_close(value[kept], expected)
    (value * weights).sum().backward()
    torch.testing.assert_close(gradients(model), wanted, **TOLERANCE)


def test_reductions_and_outer_factors() -> None:
    model, inputs = build("llama"), batch()
    n = int((inputs["labels"][:, 1:] != -100).sum())
    goal = Objective(model, {"cross_entropy": 1.0})
    mean = goal(**inputs)
    mean.backward()
    plain = gradients(model)
    torch.testing.assert_close(goal(**inputs, reduction="sum"), mean * n)
    torch.testing.assert_close(goal.parts["cross_entropy"], mean.detach() * n)
    torch.testing.assert_close(goal(**inputs, num_items_in_batch=2 * n), mean / 2)
    torch.testing.assert_close(goal(**inputs, num_items_in_batch=torch.tensor(2 * n)), mean / 2)
    (goal(**inputs) * 3 + 1).backward()
    torch.testing.assert_close(gradients(model), {k: 3 * g for k, g in plain.items()})


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mix", MIXES)
def test_no_valid_token_gives_exactly_zero(mix: str, reduction: Any) -> None:
    model, inputs, losses = build("llama"), batch(), MIXES[mix]
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    value = Objective(model, losses, teacher_for(losses))(**inputs, reduction=reduction)
    assert (value == 0).all()
    value.sum().backward()
    found = gradients(model)
    assert set(found) == {k for k, _ in model.named_parameters()}
    assert all((g == 0).all() for g in found.values())


def test_masked_positions_are_not_computed() -> None:
    model, inputs = build("llama"), batch()
    seen: list[int] = []

    class Counting(L.Entmax15):  # type: ignore[misc, name-defined]
        def per_token(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
            seen.append(logits.numel())
            return super().per_token(logits, labels, teacher)

    Objective(model, {Counting(): 1.0}, memory=32 * V)(**inputs)
    kept = int((inputs["labels"][:, 1:] != -100).sum())
    assert sum(seen) == kept * V
    assert max(seen) <= 4 * V


def test_never_holds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor made in forward or backward is as large as tokens × V, for blocks and for chunks."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "vocab_size": 5000}, tie_word_embeddings=False)
    )
    ids = torch.randint(1, 5000, (2, 200), generator=torch.Generator().manual_seed(0))
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    for losses in ({"cross_entropy": 1.0}, {"sparsemax": 1.0}):
        goal = Objective(model, losses, memory=80_000)
        goal(input_ids=ids, labels=ids)
        with Watch():
            goal(input_ids=ids, labels=ids).backward()
    assert largest < 400 * 5000 / 4


def random_head(tokens: int, dtype: torch.dtype) -> tuple[Tensor, nn.Parameter, Tensor]:
    g = torch.Generator().manual_seed(6)
    hidden = torch.randn(tokens, D, generator=g).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(V, D, generator=g).to(dtype))
    return hidden, weight, torch.randint(V, (tokens,), generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("memory", "walks"), [(10**6, 1.0), (0, 2.0), ("first block", 1 + (V - 64) / V)]
)
def test_scores_that_fit_are_computed_once(
    memory: Any, walks: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others twice; the result is the same to the last bit."""
    hidden, weight, labels = random_head(40, dtype)
    columns: list[int] = []
    block = Scorer.block

    def counted(head: Scorer, x: Tensor, start: int, stop: int) -> Tensor:
        columns.append(stop - start)
        return block(head, x, start, stop)

    monkeypatch.setattr(Scorer, "block", counted)
    size = 40 * 64 * dtype.itemsize if memory == "first block" else memory
    found = []
    for kept in (size, 10**6):
        columns.clear()
        numbers = frozenset(("log_prob", "logsumexp"))
        value = blocks(
            hidden,
            labels,
            Scorer(weight, None, LogitTransform()),
            numbers,  # type: ignore[arg-type]
            lambda n: n["logsumexp"].square().mean() - n["log_prob"].mean(),
            elements=40 * 64,
            memory=kept,
        )
        found.append([value, *torch.autograd.grad(value, [hidden, weight])])
        if kept == size:
            assert sum(columns) == round(walks * V)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("losses", ["cross_entropy", "entmax15"])
def test_full_precision_is_as_good_as_eager(losses: str) -> None:
    """Error to float64 at most twice that of eager fp32, and the value equal to 1e-6."""
    hidden, weight, labels = random_head(300, torch.float32)
    spec = {"cross_entropy": L.CrossEntropy(), "entmax15": L.Entmax15()}[losses]

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return spec.per_token(h @ w.T, labels, None).mean()

    model = build("llama", torch.float32)
    model.lm_head.weight = weight
    inputs = [hidden, weight]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(plain(*exact), exact)
    eager_value = plain(hidden, weight)
    theirs = torch.autograd.grad(eager_value, inputs)
    for memory in (0, 64 * V * 4, 2**29):
        value = Objective(model, {spec: 1.0}, memory=memory).from_hidden(hidden, labels)
        torch.testing.assert_close(value, eager_value, rtol=1e-6, atol=0)
        for mine, their, exactly in zip(
            torch.autograd.grad(value, inputs), theirs, wanted, strict=True
        ):
            floor = 2**-23 * exactly.norm()
            assert (mine - exactly).norm() <= 2 * (their - exactly).norm() + floor


@pytest.mark.parametrize("family", ["llama", "gemma2_soft_cap"])
@pytest.mark.parametrize("losses", [{"cross_entropy": 1.0}, {"kl": 1.0, "cross_entropy": 1.0}])
def test_half_precision_is_as_good_as_eager(family: str, losses: Any) -> None:
    """Error to float64 at most twice that of eager bf16, for every gradient."""
    inputs = batch(4, 40)
    teacher = teacher_for({L.KL(): 1}) if "kl" in losses else None
    specs = {
        getattr(L, {"kl": "KL", "cross_entropy": "CrossEntropy"}[k])(): w for k, w in losses.items()
    }

    def run(dtype: torch.dtype, ours: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = build(family, torch.bfloat16).to(dtype)
        t = None if teacher is None else teacher.to(torch.bfloat16).to(dtype)
        value = (
            Objective(model, specs, t, memory=6 * V)(**inputs)
            if ours
            else eager(model, specs, inputs, t).mean()
        )
        value.backward()
        return value.detach().double(), {k: g.double() for k, g in gradients(model).items()}

    exact, exact_grads = run(torch.float64, ours=False)
    plain, plain_grads = run(torch.bfloat16, ours=False)
    value, grads = run(torch.bfloat16, ours=True)
    assert (value - exact).abs() <= 2 * (plain - exact).abs() + 2**-8
    for name, g in exact_grads.items():
        error, floor = (plain_grads[name] - g).norm(), 2**-8 * g.norm()
        assert (grads[name] - g).norm() <= 2 * error + floor, name


def test_autocast_trains_float32_weights() -> None:
    model, inputs = build("llama", torch.float32), batch()
    expected = eager(model, {L.CrossEntropy(): 1.0}, inputs).mean()
    expected.backward()
    wanted = gradients(model)
    for losses in ({"cross_entropy": 1.0}, {"entmax15": 0.0, "cross_entropy": 1.0}):
        goal = Objective(model, losses)
        with torch.autocast("cpu", torch.bfloat16):
            value = goal(**inputs)
        value.backward()
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)
        for name, g in gradients(model).items():
            assert g.dtype == torch.float32
            assert (g - wanted[name]).norm() <= 0.1 * wanted[name].norm()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("target", ["lm_head", "modules_to_save", "body"])
def test_lora(target: str) -> None:
    config = {
        "lm_head": LoraConfig(target_modules=["q_proj", "lm_head"], r=4),
        "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=4),
        "body": LoraConfig(target_modules=["q_proj"], r=4),
    }[target]
    model = get_peft_model(build("llama"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    inputs, teacher = batch(), teacher_for({L.KL(): 1})
    for losses in ({L.CrossEntropy(): 1.0}, {L.CrossEntropy(): 1.0, L.Entmax15(): 0.5}):
        expected = eager(model, losses, inputs).mean()
        expected.backward()
        wanted = gradients(model)
        value = Objective(model, losses, memory=32 * V)(**inputs)
        value.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(model), wanted, **TOLERANCE)
    assert Objective(model, {"kl": 1.0}, teacher)(**inputs).isfinite()


def test_another_model_as_teacher() -> None:
    model, inputs = build("llama"), batch()
    torch.manual_seed(5)
    teacher = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)).double()
    kept = inputs["labels"][:, 1:] != -100
    forward = {k: v for k, v in inputs.items() if k != "labels"}
    z = model(**forward).logits[:, :-1][kept]
    t = teacher(**forward).logits[:, :-1][kept].detach()
    losses = {L.KL(): 1.0, L.HiddenMSE(): 0.5}
    hidden = [last_hidden(m, forward)[:, :-1][kept] for m in (model, teacher)]
    expected = L.KL().per_token(z, inputs["labels"][:, 1:][kept], t).mean()
    expected = expected + 0.5 * (hidden[0] - hidden[1].detach()).square().mean()
    expected.backward()
    wanted = gradients(model)
    for reduction in ("mean", "none"):
        value = Objective(model, losses, teacher, memory=40 * V)(**inputs, reduction=reduction)
        value = value if reduction == "mean" else value.sum() / kept.sum()
        value.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(model), wanted, **TOLERANCE)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_head_as_teacher() -> None:
    model, inputs = build("gemma2_soft_cap"), batch()
    matrix = teacher_for({L.KL(): 1})
    assert matrix is not None
    head = nn.Linear(D, V, bias=False).double()
    head.weight = nn.Parameter(matrix)
    torch.testing.assert_close(
        Objective(model, {"kl": 1.0}, head)(**inputs),
        Objective(model, {"kl": 1.0}, matrix)(**inputs),
    )


def test_sampled_losses_read_only_their_rows() -> None:
    model, inputs = build("llama"), batch()
    for loss in (L.SampledSoftmax(samples=5), L.NegativeSampling(samples=5)):
        torch.manual_seed(0)
        expected = eager(model, {loss: 1.0}, inputs).mean()
        expected.backward()
        wanted = gradients(model)
        torch.manual_seed(0)
        value = Objective(model, {loss: 1.0})(**inputs)
        value.backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(model), wanted)


def test_cosine_losses_normalise_states_and_rows() -> None:
    model, inputs = build("llama"), batch()
    loss = L.PartialFC(rate=0.5)
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    hidden = last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"})[:, :-1][kept]
    cosines = F.normalize(hidden, dim=-1) @ F.normalize(model.lm_head.weight, dim=-1).T
    torch.manual_seed(0)
    expected = loss.per_token(cosines, labels[kept], None).mean()
    torch.manual_seed(0)
    torch.testing.assert_close(Objective(model, {loss: 1.0})(**inputs), expected)


def test_noisy_softmax_gets_real_norms() -> None:
    model, inputs = build("llama"), batch()
    labels = inputs["labels"][:, 1:]
    kept = labels != -100
    forward = {k: v for k, v in inputs.items() if k != "labels"}
    hidden = last_hidden(model, forward)[:, :-1][kept]
    norms = hidden.norm(dim=-1) * model.lm_head.weight[labels[kept]].norm(dim=-1)
    torch.manual_seed(0)
    z = F.linear(hidden, model.lm_head.weight)
    expected = L.NoisySoftmax().per_token(z, labels[kept], None, norms=norms).mean()
    torch.manual_seed(0)
    torch.testing.assert_close(Objective(model, {"noisy_softmax": 1.0})(**inputs), expected)


def test_several_right_answers() -> None:
    model, inputs = build("llama"), batch()
    one = Objective(model, {"cross_entropy": 1.0})(**inputs)
    several = torch.full((*inputs["labels"].shape, 2), -100)
    several[..., 0] = inputs["labels"]
    inputs["labels"] = several
    torch.testing.assert_close(Objective(model, {"decoupled_softmax": 1.0})(**inputs), one)


def test_hidden_states_at_hand() -> None:
    model, inputs = build("llama"), batch()
    kept = inputs["labels"][:, 1:] != -100
    hidden = last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"})[:, :-1][kept]
    goal = Objective(model, {"cross_entropy": 1.0})
    value = goal.from_hidden(hidden.detach(), inputs["labels"][:, 1:][kept])
    torch.testing.assert_close(value, goal(**inputs))
    value.backward()
    assert set(gradients(model)) == {"lm_head.weight"}


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning"
)  # dynamo looks at the stand-in
def test_compiled_model() -> None:
    model, inputs = build("llama", torch.float32), batch()
    goal = Objective(model, {"cross_entropy": 1.0})
    goal(**inputs).backward()
    wanted = gradients(model)
    compiled = Objective(torch.compile(model, backend="eager"), {"cross_entropy": 1.0})
    for _ in range(2):
        compiled(**inputs).backward()
        torch.testing.assert_close(gradients(model), wanted)


def test_gradient_checkpointing() -> None:
    model, inputs = build("llama"), batch()
    goal = Objective(model, {"cross_entropy": 1.0})
    goal(**inputs).backward()
    wanted = gradients(model)
    older = getattr(model, "gradient_checkpointing_enable", None)  # its name in transformers 5.0
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    goal(**inputs).backward()
    torch.testing.assert_close(gradients(model), wanted)


def test_evaluation_needs_no_gradients() -> None:
    model, inputs = build("llama").eval(), batch()
    goal = Objective(model, {"cross_entropy": 1.0, "entmax15": 1.0})
    value = goal(**inputs).detach()
    with torch.no_grad():
        torch.testing.assert_close(goal(**inputs), value)
        torch.testing.assert_close(goal(**inputs, reduction="none").sum() / 23, value)


def test_gradients_can_be_taken_once() -> None:
    model, inputs = build("llama"), batch()
    value = Objective(model, {"cross_entropy": 1.0})(**inputs)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the Objective again"):
        value.backward()


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = build("llama"), batch()
    Objective(model, {"cross_entropy": 1.0})(**inputs)
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 13, V)
    inputs["labels"] = inputs["labels"][:, :5]
    with pytest.raises(ValueError, match="labels are 3 × 5"):
        Objective(model, {"cross_entropy": 1.0})(**inputs)
    assert "forward" not in model.lm_head.__dict__


def test_trainer_hook_changes_training_only() -> None:
    model, inputs = build("llama"), batch()
    expected = eager(model, {L.CrossEntropy(): 1.0}, inputs).mean()
    expected.backward()
    wanted = gradients(model)
    trainer_loss(model)
    out = model(**inputs)
    assert out.logits is None
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(model), wanted)
    assert model.eval()(**inputs).logits.shape == (3, 13, V)


@pytest.mark.parametrize("family", ["llama", "gemma2_soft_cap", "granite_scaled"])
@pytest.mark.parametrize("mix", ["cross_entropy", "summary", "distilled"])
def test_a_structured_head(family: str, mix: str) -> None:
    """In code space where that is exact, from whole logits under a soft cap."""
    model, inputs, losses = build(family, torch.float32), batch(), MIXES[mix]
    sh.patch(model, head=VQ(codes=20))
    teacher = teacher_for(losses)
    teacher = None if teacher is None else teacher.float()
    expected = eager(model, losses, inputs, teacher).mean()
    expected.backward()
    wanted = gradients(model)
    value = Objective(model, losses, teacher, memory=40 * V)(**inputs)
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-3, atol=1e-5)


def test_code_space_never_sees_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("llama", torch.float32), batch()
    sh.patch(model, head=VQ(codes=20))
    goal = Objective(model, {"cross_entropy": 1.0, "z_loss": 0.1})
    goal(**inputs)
    monkeypatch.setattr(type(model.lm_head), "scores", None)
    goal(**inputs).backward()


class Renamed(LlamaForCausalLM):
    """A family that does something unknown to its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.sin()
        return out


class Sharper(LlamaForCausalLM):
    """A family that does something to its logits that a trace of one token does not see."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.logits.shape[1] > 1:
            out.logits = 1.5 * out.logits
        return out


@pytest.mark.parametrize("hook", [False, True])
def test_other_logits_than_the_trace_promises_are_refused(hook: bool) -> None:
    """Before the first loss is computed, the head's scores are compared with real logits."""
    model, inputs = Sharper(build("llama").config).double().train(), batch()
    goal = Objective(model, {"cross_entropy": 1.0})
    if hook:
        trainer_loss(model)
    with pytest.raises(ValueError, match=r"Sharper differ by .* not understood"):
        (model if hook else goal)(**inputs)
    assert model.training
    assert not model.lm_head._forward_hooks
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Objective(m, {}), "at least one loss"),
        (lambda m: Objective(m, {"cross_entropy": float("nan")}), "weight of cross_entropy is nan"),
        (lambda m: Objective(m, {"kl": 1.0}), "kl needs a teacher to compare with"),
        (lambda m: Objective(m, {"cross_entropy": 1.0}, torch.zeros(V, D)), "none of the losses"),
        (lambda m: Objective(m, {"kl": 1.0}, torch.zeros(V + 1, D)), "98 tokens, the model 97"),
        (lambda m: Objective(m, {"hidden_mse": 1.0}, torch.zeros(V, D)), "another model"),
        (lambda m: Objective(m.model, {"cross_entropy": 1.0}), "no output embedding"),
        (lambda m: Objective(m, {"crossentropy": 1.0}), "did you mean 'cross_entropy'"),
        (
            lambda m: Objective(Renamed(m.config), {"cross_entropy": 1.0}),
            "changes its logits after its head",
        ),
        (lambda m: Objective(m, {"cross_entropy": 1.0})(**batch(), reduction="avg"), "'avg'"),
        (lambda m: Objective(m, {"cross_entropy": 1.0}, memory=-1), "bytes, got -1"),
    ],
)
def test_wrong_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(build("llama"))


@pytest.mark.parametrize("label", [V, -1, 10**6])
def test_labels_outside_the_vocabulary_are_refused(label: int) -> None:
    inputs = batch()
    inputs["labels"][1, 5] = label
    with pytest.raises(ValueError, match="token ids from 0 to 96"):
        Objective(build("llama"), {"cross_entropy": 1.0})(**inputs)


def test_dense_variant_is_a_matrix_to_the_objective() -> None:
    """The patched control takes the same path as `nn.Linear`; a head without an own log_prob takes whole logits."""
    inputs = batch()
    model = build("phi_bias")
    goal = Objective(model, {"cross_entropy": 1.0})
    goal(**inputs).backward()
    wanted = gradients(model)
    dense = Dense().module(D, V, bias=True).double()
    Dense().fit(dense, model.lm_head.weight, model.lm_head.bias, None)
    model.set_output_embeddings(dense)
    Objective(model, {"cross_entropy": 1.0})(**inputs).backward()
    torch.testing.assert_close(gradients(model), wanted)

    class Doubled(Head):
        def __init__(self) -> None:
            super().__init__(D, V)
            self.weight = dense.weight

        def scores(self, hidden: Tensor) -> Tensor:
            return F.linear(hidden, self.weight, dense.bias)

    model.set_output_embeddings(Doubled())
    Objective(model, {"cross_entropy": 1.0}, memory=32 * V)(**inputs).backward()
    got = gradients(model)
    torch.testing.assert_close(got["lm_head.weight"], wanted["lm_head.weight"])
