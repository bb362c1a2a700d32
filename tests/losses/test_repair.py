"""Head repair: it learns what it can represent, touches nothing but the head, and fails without damage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hf_softheads as sh
from hf_softheads.heads import VQ, Dense, LowRankResidual, Quantized, TransformCoded
from hf_softheads.heads.base import HeadSpec
from hf_softheads.heads.fit.gptq import round_through
from hf_softheads.plan import dense_head
from hf_softheads.training import cached_states
from hf_softheads.training import distill_head as repair
from hf_softheads.training.cached_states import cache_states
from hf_softheads.training.distill_head import repair_head
from hf_softheads.training.orthograd import OrthoGrad, orthogonal
from tests.conftest import make_model

V, D = 61, 16


def model() -> Any:
    made = make_model("llama", vocab_size=V, hidden_size=D, tie_word_embeddings=False)
    torch.nn.init.normal_(made.lm_head.weight, std=1.0)
    return made


def rows() -> torch.Tensor:
    return torch.randint(0, V, (40, 17), generator=torch.Generator().manual_seed(1))


def test_a_head_that_can_be_the_teacher_becomes_it() -> None:
    patched = sh.patch(model(), head=Dense())
    teacher = dense_head(patched)
    with torch.no_grad():
        patched.lm_head.weight.add_(0.3 * torch.randn(V, D))
    found = repair_head(patched, teacher, rows(), steps=150, batch_size=128, lr=2e-2)
    assert found.tokens == 640
    assert found.last < 0.05 * found.first


def test_only_the_head_changes_and_a_seed_decides_how() -> None:
    results = []
    for _ in range(2):
        patched = sh.patch(model(), head=VQ(codes=20)).train()
        before = {k: v.clone() for k, v in patched.state_dict().items()}
        repair_head(patched, dense_head(patched), rows(), steps=5, batch_size=32, seed=3)
        after = patched.state_dict()
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert changed == {"lm_head.weight"}
        assert patched.training
        assert all(p.requires_grad and p.grad is None for p in patched.parameters())
        results.append(after["lm_head.weight"])
    assert torch.equal(*results)


def test_a_matrix_and_several_losses() -> None:
    patched = sh.patch(model(), head=VQ(codes=20))
    matrix = dense_head(patched).weight.detach()
    found = repair_head(
        patched, matrix, rows(), steps=40, batch_size=64, losses={"kl": 1.0, "cross_entropy": 0.1}
    )
    assert found.last < found.first


def test_divergence_leaves_the_head_as_it_was() -> None:
    patched = sh.patch(model(), head=VQ(codes=20))
    before = {k: v.clone() for k, v in patched.state_dict().items()}
    with pytest.raises(ValueError, match="the head was put back"):
        repair_head(patched, dense_head(patched), rows(), steps=30, batch_size=32, lr=1e37)
    torch.testing.assert_close(dict(patched.state_dict()), before, rtol=0, atol=0)


CODED: list[HeadSpec] = [Quantized(2), LowRankResidual(2, 2), TransformCoded(8.0, 12, 2)]


def correlated() -> tuple[Any, torch.Tensor]:
    """A model and text for it, 8,000 codes: enough that those which fall this way or that by rounding make no odds.

    As in real models a few directions carry most of the hidden states, so that codes can be better than the nearest.
    """
    vocab, dim = 251, 32
    made = make_model("llama", vocab_size=vocab, hidden_size=dim, tie_word_embeddings=False)
    torch.nn.init.normal_(made.lm_head.weight, std=1.0)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    entries = torch.randn(vocab, dim, generator=generator) * torch.logspace(0, -1, dim)
    with torch.no_grad():
        made.model.embed_tokens.weight.copy_(entries @ turn)
    return made, torch.randint(vocab, (40, 17), generator=generator)


def repaired(spec: HeadSpec, code_lr: float) -> tuple[Any, float]:
    """The head after a repair, and how far it is from the dense one on the text it was repaired on."""
    made, text = correlated()
    patched = sh.patch(made, head=spec)
    teacher = dense_head(patched)
    repair_head(patched, teacher, text, steps=80, batch_size=128, lr=2e-4, code_lr=code_lr)
    hidden = cache_states(patched, text, tokens=10**6)[0]
    mine, dense = (h(hidden).log_softmax(-1).detach() for h in (patched.lm_head, teacher))
    return patched.lm_head, float((dense.exp() * (dense - mine)).sum(-1).mean())


@pytest.mark.parametrize(
    "spec",
    [Quantized(2), LowRankResidual(2, 2), TransformCoded(5.0, 24, 2)],
    ids=lambda spec: spec.name,
)
def test_trained_codes_come_nearer_and_are_stored_as_before(spec: HeadSpec) -> None:
    fitted = sh.patch(correlated()[0], head=spec).lm_head.state_dict()
    _, fixed = repaired(spec, code_lr=0)
    head, trained = repaired(spec, code_lr=0.05)
    assert trained < 0.8 * fixed
    state = head.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in fitted.items()
    }
    codes = [k for k in state if k.startswith("codes")]
    assert any(not torch.equal(state[k], fitted[k]) for k in codes)
    loaded = spec.module(head.in_features, head.out_features)
    loaded.load_state_dict(state)
    h = torch.randn(5, head.in_features, generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded.eval()(h), head(h))


def test_codes_are_trained_the_same_again() -> None:
    (once, first), (again, second) = (repaired(Quantized(2), code_lr=0.05) for _ in range(2))
    assert first == second
    assert all(torch.equal(v, once.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("spec", CODED, ids=lambda spec: spec.name)
def test_a_head_knows_the_rates_that_suit_it(spec: HeadSpec) -> None:
    """Without a rate every parameter moves, none by more than its own size, and the head comes nearer."""
    patched = sh.patch(model(), head=spec)
    before = {k: p.detach().clone() for k, p in patched.lm_head.named_parameters()}
    found = repair_head(patched, dense_head(patched), rows(), steps=40, batch_size=128)
    assert found.last < 0.9 * found.first
    for name, parameter in patched.lm_head.named_parameters():
        if name != "center":  # moves all logits alike: no gradient
            assert 0 < (parameter - before[name]).norm() < before[name].norm()


def test_a_head_that_is_nearly_right_is_not_shaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of a first step that lowers the loss, where the suggested one raises it many times over."""

    def last(factors: tuple[float, ...]) -> float:
        monkeypatch.setattr(repair, "_FACTORS", factors)
        patched = sh.patch(model(), head=TransformCoded(bits=9.0, tiers=2))
        try:
            return repair_head(
                patched, dense_head(patched), rows(), steps=8, batch_size=128, code_lr=0
            ).last
        except ValueError:  # put back, because it is worse than before
            return math.inf

    tried = {factor: last((factor,)) for factor in repair._FACTORS}
    assert last(tuple(tried)) < 0.8 * tried[1.0]
    assert last(tuple(tried)) <= 1.5 * min(tried.values())


@pytest.mark.parametrize("spec", CODED, ids=lambda spec: spec.name)
def test_thawed_codes_score_as_stored(spec: HeadSpec) -> None:
    head = sh.patch(model(), head=spec).lm_head.train()  # scored without kernels
    before = {k: v.clone() for k, v in head.state_dict().items()}
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    packed = head(h)
    (latent,) = head.relax_codes()
    assert torch.equal(head(h), packed)
    torch.testing.assert_close(h @ head.dense()[0].T, packed, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        latent += torch.rand(latent.shape, generator=torch.Generator().manual_seed(3)) * 0.98 - 0.49
    assert torch.equal(head(h), packed)
    assert set(head.state_dict()) == set(before)
    head.round_codes()
    assert torch.equal(head(h), packed)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    with torch.no_grad():
        head.relax_codes()[0].add_(100)  # far outside: the highest code
    thawed = head(h)
    head.round_codes()
    assert torch.equal(head(h), thawed)


def test_gradient_goes_through_rounding_but_not_further_out() -> None:
    latent = torch.tensor([-0.2, -0.2, 1.4, 3.3, 3.3], requires_grad=True)
    rounded = round_through(latent, 3.0)
    assert rounded.tolist() == [0, 0, 1, 3, 3]
    rounded.backward(torch.tensor([1.0, -1.0, 2.0, -1.0, 1.0]))
    assert latent.grad is not None
    assert latent.grad.tolist() == [0, -1, 2, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": torch.zeros(3, 1, dtype=torch.long)}, "token windows"),
        ({"steps": 0}, "at least one step"),
        ({"teacher": torch.zeros(V + 1, D)}, "62 tokens, the model 61"),
    ],
)
def test_wrong_input_is_refused(arguments: Any, message: str) -> None:
    patched = sh.patch(model(), head=VQ(codes=20))
    given = {"teacher": dense_head(patched), "rows": rows(), **arguments}
    with pytest.raises(ValueError, match=message):
        repair_head(patched, given.pop("teacher"), given.pop("rows"), **given)


def test_orthograd_keeps_length_and_drops_the_radial_part() -> None:
    g = torch.Generator().manual_seed(0)
    w, x = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    found = orthogonal(w, x)
    assert (found * w).sum().abs() < 1e-12
    torch.testing.assert_close(found.norm(), x.norm())
    across = x - (w * x).sum() / (w * w).sum() * w
    torch.testing.assert_close(found / found.norm(), across / across.norm())


def test_orthograd_wraps_any_optimizer() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = OrthoGrad(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    before = weight.detach().clone()
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(weight, before)
    again = OrthoGrad(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        again.state[weight]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"]
    )


def test_more_text_than_fits_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    patched = sh.patch(model(), head=VQ(codes=20))
    states = rows()[:, 1:].numel()
    monkeypatch.setattr(cached_states, "CACHE_BYTES", states * D * 4 // 3)
    done = repair_head(patched, dense_head(patched), rows(), steps=60, batch_size=64)
    assert done.tokens == states  # each in just one part
    assert done.last < done.first
