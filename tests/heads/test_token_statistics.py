"""`token_statistics` of every head against the definition on whole logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hf_softheads as sh
from hf_softheads.bridge import SplitModel
from hf_softheads.heads import VQ, Dense, Draft, Quantized, base
from hf_softheads.heads.base import Head, HeadSpec
from hf_softheads.heads.forms import matrix_numbers, streamed_rows
from hf_softheads.training.token_statistics import token_statistics
from tests.conftest import VOCAB, make_model
from tests.heads.conftest import Toy
from tests.heads.test_contract import COMPOSED, NAMES, TRANSFORMS, _Largest, fitted, specs

MORE: dict[str, HeadSpec] = {
    **COMPOSED,
    "vq with a bias": VQ(32, bias="fitted"),
    "draft, half of the tokens": Draft(128),
}


@pytest.fixture(params=[*NAMES, *MORE])
def middle(request: pytest.FixtureRequest, toy: Toy) -> HeadSpec:
    if request.param in MORE:
        return MORE[request.param]
    ladder = specs(request.param, toy)
    return ladder[len(ladder) // 2]


def by_definition(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, Tensor]:
    """From whole logits, in float64."""
    z = logits.double() / temperature
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    return {
        "log_prob": log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "entropy": -torch.where(p > 0, p * log_p, 0).sum(-1),
        "argmax": z.argmax(-1),
        "mean": z.mean(-1),
        "squares": p.square().sum(-1).log(),
    }


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_CHUNK_ELEMENTS", 2**12)
    monkeypatch.setattr(streamed_rows, "_BLOCK", 100)
    monkeypatch.setattr(matrix_numbers, "_COLUMNS", 100)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("transform", "temperature"), [("none", 0.7), ("scale", 1.3), ("soft cap", 0.7)]
)
def test_equals_the_definition(
    middle: HeadSpec, toy: Toy, transform: str, temperature: float
) -> None:
    head = fitted(middle, toy, TRANSFORMS[transform])
    hidden, labels = toy.hidden[:40].view(4, 10, 16), toy.labels[:40].view(4, 10)
    with torch.no_grad():
        logits = head.logits(hidden)
        found = head.token_statistics(hidden, labels, temperature)
        mean, squares = head.token_numbers(hidden, labels, temperature, True)[..., 3:].unbind(-1)
    wanted = by_definition(logits, labels, temperature)
    close = {"rtol": 1e-4, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(found.log_prob, wanted["log_prob"], **close)
    torch.testing.assert_close(found.entropy, wanted["entropy"], **close)
    torch.testing.assert_close(mean, wanted["mean"], **close)
    torch.testing.assert_close(squares, wanted["squares"], **close)
    best = logits.gather(-1, found.argmax.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(best, logits.amax(-1), rtol=1e-5, atol=1e-5)
    assert found.argmax.dtype == torch.long


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("transform", ["none", "soft cap"])
def test_gradients_are_those_of_whole_logits(middle: HeadSpec, toy: Toy, transform: str) -> None:
    head = fitted(middle, toy, TRANSFORMS[transform])
    hidden, labels = toy.hidden[:40].clone().requires_grad_(), toy.labels[:40].clone()
    labels[::7] = -100
    if not bool(head.token_statistics(hidden, labels).log_prob.isfinite().all()):
        labels = head.topk(hidden, 1)[1].squeeze(-1)  # a draft head's tokens alone
    kept = labels != -100
    inputs = {"hidden": hidden, **dict(head.named_parameters())}
    found = head.token_statistics(hidden, labels, 0.7)
    mine = (2 * found.log_prob - 0.3 * found.entropy).sum()
    logits = head.logits(hidden)[kept]
    logits = torch.where(logits.isinf(), -1e9, logits)
    wanted = by_definition(logits, labels[kept], 0.7)
    plain = (2 * wanted["log_prob"] - 0.3 * wanted["entropy"]).sum()
    grads = [torch.autograd.grad(loss, list(inputs.values())) for loss in (mine, plain)]
    # a shift that all tokens share has a gradient of 0, up to the rounding of terms as large as the others'
    bound = 1e-4 * max(float(g.abs().max()) for g in grads[1])
    for name, a, b in zip(inputs, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_ignored_labels_give_zero(middle: HeadSpec, toy: Toy) -> None:
    head = fitted(middle, toy)
    labels = toy.labels[:6].view(2, 3).clone()
    labels[0, 1], labels[1, 2] = -100, -100
    hidden = toy.hidden[:6].view(2, 3, 16).clone()
    hidden[0, 1] = torch.nan  # is not computed at all
    found = head.token_statistics(hidden, labels)
    for each in found:
        assert each.shape == (2, 3)
        assert each[0, 1] == each[1, 2] == 0
        assert bool(each.isfinite().all()) or each is found.log_prob
    nothing = head.token_statistics(hidden.requires_grad_(), torch.full((2, 3), -100))
    assert float(nothing.log_prob.detach().abs().sum() + nothing.entropy.detach().abs().sum()) == 0
    nothing.log_prob.sum().backward()  # a micro-batch without labels can still be trained on


def test_refuses_a_temperature_of_zero(toy: Toy) -> None:
    head = fitted(Dense(), toy)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        head.token_statistics(toy.hidden[:2], toy.labels[:2], 0.0)


def test_never_holds_all_logits(
    middle: HeadSpec, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_CHUNK_ELEMENTS", 2**14)
    monkeypatch.setattr(matrix_numbers, "_COLUMNS", 8)
    head = fitted(middle, toy)
    with torch.no_grad(), _Largest() as largest:
        head.token_statistics(toy.hidden, toy.labels)
    assert largest.elements < len(toy.hidden) * toy.weight.shape[0] / 8


def test_large_logits_keep_a_small_entropy(toy: Toy) -> None:
    """A difference of two numbers near 10,000 would have an error near 0.001 in fp32."""
    head: Head = Dense().module(2, 8)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1e4, i * 2.0] for i in range(8)]))
    hidden = torch.tensor([[1.0, 1.0]])
    found = head.token_statistics(hidden, torch.tensor([7]))
    logits = head.logits(hidden)
    wanted = by_definition(logits, torch.tensor([7]), 1.0)
    torch.testing.assert_close(
        found.entropy, wanted["entropy"], rtol=1e-5, atol=1e-6, check_dtype=False
    )


def test_codes_do_it_among_themselves(toy: Toy) -> None:
    """A VQ head never makes a number per token of the vocabulary."""
    head = fitted(VQ(8), toy)
    head.token_statistics(toy.hidden, toy.labels)  # builds the tables
    with torch.no_grad(), _Largest() as largest:
        head.token_statistics(toy.hidden, toy.labels)
    assert largest.elements <= len(toy.hidden) * max(16, 8)


def test_half_precision_hidden_states(toy: Toy) -> None:
    head = fitted(Quantized(4), toy).to(torch.bfloat16)
    hidden = toy.hidden[:32].bfloat16()
    with torch.no_grad():
        found = head.token_statistics(hidden, toy.labels[:32])
        wanted = by_definition(head.logits(hidden), toy.labels[:32], 1.0)
    assert found.log_prob.dtype == torch.float32
    torch.testing.assert_close(
        found.log_prob, wanted["log_prob"], rtol=1e-3, atol=1e-3, check_dtype=False
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["gemma2", "granite", "llama"])
@pytest.mark.parametrize("kind", ["plain", "adapted", "patched"])
def test_of_a_models_head_through_an_objective(family: str, kind: str) -> None:
    model = make_model(family, tie_word_embeddings=False)
    if kind == "patched":
        sh.patch(model, head=VQ(24))
    if kind == "adapted":
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
        model = get_peft_model(model, lora)
        nn.init.normal_(model.base_model.model.lm_head.lora_B.default.weight, std=0.2)
    ids = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[:, :3] = -100
    kept = labels != -100
    states = SplitModel(model.get_base_model() if kind == "adapted" else model)
    hidden = states.hidden(input_ids=ids)[:, :-1].detach().requires_grad_()
    found = sh.Objective(model, {"cross_entropy": 1.0}).token_statistics(hidden, labels, 0.8)
    wanted = by_definition(model(input_ids=ids).logits[:, :-1], labels.clamp_min(0), 0.8)
    for name in ("log_prob", "entropy", "argmax"):
        value = wanted[name].masked_fill(~kept, 0)
        torch.testing.assert_close(
            getattr(found, name), value, rtol=1e-4, atol=2e-5, check_dtype=False
        )
    (found.log_prob - found.entropy).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[kept].abs().sum() > 0
    assert hidden.grad[~kept].abs().sum() == 0


@pytest.mark.usefixtures("small_chunks")
def test_impossible_tokens_of_a_dense_head(toy: Toy) -> None:
    """A bias of -inf, in the first block, in the last, and in all of one, adds nothing and gives no NaN."""
    linear = nn.Linear(*toy.weight.shape[::-1])
    with torch.no_grad():
        linear.weight.copy_(toy.weight)
        linear.bias.zero_()
        for dead in (slice(0, 3), slice(100, 200), slice(250, 256)):
            linear.bias[dead] = -torch.inf
    hidden = toy.hidden[:20].clone().requires_grad_()
    alive = linear.bias.detach().isfinite()
    labels = torch.arange(20) + 10
    found = token_statistics(linear, hidden, labels)
    wanted = by_definition((toy.hidden[:20] @ toy.weight.T)[:, alive], labels - 3, 1.0)
    for name in ("log_prob", "entropy"):
        value = getattr(found, name)
        torch.testing.assert_close(value, wanted[name].float(), rtol=1e-4, atol=2e-5)
    assert torch.equal(found.argmax, alive.nonzero().squeeze(-1)[wanted["argmax"]])
    (found.log_prob - found.entropy).sum().backward()
    grads = [hidden.grad, linear.weight.grad, linear.bias.grad]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert linear.weight.grad is not None
    assert float(linear.weight.grad[~alive].abs().max()) < 1e-30


def test_room_for_a_block_is_made_once(toy: Toy) -> None:
    """Each walk over the vocabulary uses the same memory for every block."""
    walk = matrix_numbers.Walk(TRANSFORMS["none"], 1.0, False, 2**12)
    hidden, weight = toy.hidden[:8], torch.zeros(1500, toy.hidden.shape[1])
    found = list(walk.blocks(hidden, weight, None))
    assert [stop - start for start, stop, *_ in found] == [512, 512, 476]
    for _, _, scores, first, second in found:
        assert first.shape == second.shape == scores.shape
        assert first.data_ptr() == found[0][3].data_ptr()
        assert second.data_ptr() == found[0][4].data_ptr()
