"""Classes and trees against their formulas: probabilities, search, exact sampling, fits, training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import hf_softheads as sh
from hf_softheads.heads import BinaryTree, Hierarchical, Quantized
from hf_softheads.heads.base import HeadSpec, LogitTransform
from hf_softheads.heads.binary_tree import BinaryTreeHead
from hf_softheads.heads.fit import tree_nodes as tree_fit
from hf_softheads.heads.fit import tree_order as bisection
from hf_softheads.heads.fit.tree_order import bisected
from hf_softheads.heads.hierarchical import HierarchicalHead, within_classes
from hf_softheads.losses import NegativeSampling
from tests.conftest import VOCAB, make_model
from tests.heads.conftest import Toy, fit, kl, make_toy


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_class_times_token_within_the_class(scale: float, toy: Toy) -> None:
    spec = Hierarchical(16)
    head: HierarchicalHead = spec.module(*toy.shape)
    head.transform = LogitTransform((("mul", scale),))
    spec.fit(head, toy.weight, None, toy.stats)
    dense = (scale * toy.hidden.double() @ toy.weight.double().T).softmax(-1)
    member = F.one_hot(head.codes.long()).double()
    classes = (scale * (toy.hidden @ head.weight.T + head.shift)).double().softmax(-1)
    expected = classes @ member.T * dense / (dense @ member @ member.T)
    found = head.logits(toy.hidden).softmax(-1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-6)


def test_classes_are_fitted_to_the_states(toy: Toy) -> None:
    fitted, plain = fit(Hierarchical(16), toy), fit(Hierarchical(16), toy, stats=False)
    assert kl(fitted, toy) < 0.7 * kl(plain, toy)
    assert "fitted to 2048 hidden states" in fitted.notes()[0]
    assert "no statistics" in plain.notes()[0]


def test_mass_of_a_class() -> None:
    z = torch.tensor([[1.0, 500.0, -500.0, 2.0]])
    found = within_classes(z, torch.tensor([0, 2, 2, 0]), 3)
    assert found[0, 0] == pytest.approx(float(torch.tensor([1.0, 2.0]).logsumexp(0)))
    assert found[0, 1] < -1e38
    assert found[0, 2] == 500.0


def test_best_tokens_are_found_in_few_classes(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    head: HierarchicalHead = fit(Hierarchical(32), toy)  # type: ignore[assignment]
    read = []
    inside = head.inside
    monkeypatch.setattr(head, "inside", lambda h, code: read.append(code) or inside(h, code))
    for hidden in toy.hidden[:20]:
        values, tokens = head.topk(hidden, 3)
        expected = head.logits(hidden).topk(3)
        torch.testing.assert_close(values, expected.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens, expected.indices)
    assert len(read) < 20 * 32 / 2


@pytest.mark.parametrize("classes", [257, 1000])
def test_refuses_impossible_classes(classes: int) -> None:
    with pytest.raises(ValueError, match=f"asked for {classes} classes of 256 tokens; 1 to 256"):
        Hierarchical(classes).check(16, 256)


def test_inner_head_may_be_any(toy: Toy) -> None:
    head = fit(Hierarchical(16, inner=Quantized(8)), toy)
    assert abs(kl(head, toy) - kl(fit(Hierarchical(16), toy), toy)) < 0.02
    assert head.nbytes < fit(Hierarchical(16), toy).nbytes / 2


@pytest.mark.parametrize("vocab", [2, 3, 7, 64, 100])
def test_tree_is_a_product_of_choices(vocab: int) -> None:
    toy = make_toy(vocab, 8, states=256)
    head: BinaryTreeHead = fit(BinaryTree(2), toy)  # type: ignore[assignment]
    with torch.no_grad():
        log_p = head(toy.hidden)
        torch.testing.assert_close(
            log_p.exp().sum(-1), torch.ones(len(log_p)), rtol=1e-4, atol=1e-4
        )
        odds = toy.hidden @ head.weight.T + head.shift
    for leaf, token in enumerate(head.order.tolist()):
        node, expected = leaf + vocab, torch.zeros(len(log_p))
        while node > 1:
            side = 1 if node % 2 == 0 else -1
            node //= 2
            expected += F.logsigmoid(side * odds[:, node - 1])
        torch.testing.assert_close(log_p[:, token], expected, rtol=1e-4, atol=1e-4)
    some = torch.randint(vocab, (5,))
    torch.testing.assert_close(head.subset(toy.hidden, some), log_p[:, some], rtol=1e-4, atol=1e-4)


def test_tree_puts_neighbours_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 5 * torch.randn(8, 6, generator=generator)
    rows = centers.repeat(8, 1) + 0.1 * torch.randn(64, 6, generator=generator)
    order = bisected(rows)
    assert torch.equal(order.sort().values, torch.arange(64))
    assert all(len(set(group)) == 1 for group in (order % 8).view(8, 8).tolist())


def test_two_tokens_are_exact() -> None:
    toy = make_toy(2, 8, states=64)
    for stats in (True, False):
        assert kl(fit(BinaryTree(0), toy, stats=stats), toy) < 1e-6


def test_newton_steps_fit_the_tree(toy: Toy) -> None:
    losses = [kl(fit(BinaryTree(passes), toy), toy) for passes in (0, 2, 8)]
    assert losses[2] < losses[1] < losses[0]
    assert "tangents" in fit(BinaryTree(), toy, stats=False).notes()[0]


@pytest.mark.parametrize("spec", [BinaryTree(0), Hierarchical(9)], ids=lambda s: s.name)
def test_negative_sampling_reads_few_rows_and_trains(spec: HeadSpec) -> None:
    model = make_model("llama")
    tokens = torch.randint(3, VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, ::2] = 5  # something to learn
    sh.patch(model, head=spec)
    head = model.get_output_embeddings()
    whole = copy.deepcopy(head)
    torch.manual_seed(0)
    repair = sh.repair_head(
        model, None, tokens, steps=30, lr=0.02, losses={NegativeSampling(samples=16): 1.0}
    )
    assert repair.last < 0.8 * repair.first
    goal = sh.Objective(model, {NegativeSampling(samples=16): 1.0})
    hidden, labels = torch.randn(12, 32), tokens.flatten()[:12]
    torch.manual_seed(3)
    found = goal.from_hidden(hidden, labels)
    torch.manual_seed(3)
    logits = head.logits(hidden)
    expected = NegativeSampling(samples=16).per_token(logits, labels, None).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole.weight, head.weight)


def test_tree_trains_without_all_scores(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    head = fit(BinaryTree(0), toy)
    monkeypatch.setattr(BinaryTreeHead, "scores", lambda *_: pytest.fail("scored everything"))
    head.token_loss(toy.hidden, toy.labels).mean().backward()
    assert head.weight.grad is not None
    head.sample(toy.hidden)


@pytest.mark.parametrize("stats", [True, False])
def test_tree_by_subtrees_is_the_same(stats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy(300, 8, states=512)  # leaves on two levels, subtrees of 3 and of 4 to 5
    whole = fit(BinaryTree(2), toy, stats=stats)
    monkeypatch.setattr(tree_fit, "_LEAVES", 8)
    monkeypatch.setattr(bisection, "BLOCK", 8)
    head = fit(BinaryTree(2), toy, stats=stats)
    assert torch.equal(head.order, whole.order)
    hidden = toy.hidden[:64]
    torch.testing.assert_close(head(hidden), whole(hidden), rtol=1e-3, atol=1e-3)
