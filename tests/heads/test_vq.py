"""VQ-Logits against its definition: maps, biases, floors, re-assignment, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from hf_softheads.heads import VQ, Dense
from hf_softheads.heads.base import LogitTransform
from hf_softheads.heads.fit.token_to_code import learn_assignment, reassign
from hf_softheads.heads.forms.vq_module import VQHead
from tests.heads.conftest import Toy


def fitted(spec: VQ, toy: Toy, *, stats: bool = True) -> VQHead:
    dim, vocab = toy.shape
    head = spec.module(dim, vocab)
    spec.fit(head, toy.weight, None, toy.stats if stats else None)
    return head


def test_matrix_of_few_distinct_rows_is_reproduced(toy: Toy) -> None:
    weight = toy.weight[:20][torch.arange(256) % 20]
    head = VQ(codes=20).module(16, 256)
    VQ(codes=20).fit(head, weight, None, None)
    torch.testing.assert_close(head(toy.hidden), toy.hidden @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["kmeans", "random", "contiguous"])
def test_published_form(init: str, toy: Toy) -> None:
    head = fitted(VQ(codes=8, init=init), toy, stats=False)  # type: ignore[arg-type]
    codes = head.codes.long()
    assert set(head.state_dict()) == {"weight", "codes", "floor"}
    assert head.codes.dtype == torch.uint8
    for code in range(8):
        mean = toy.weight[codes == code].mean(0)
        torch.testing.assert_close(head.weight[code], mean, rtol=1e-4, atol=1e-5)
    expected = (toy.hidden @ head.weight.T)[:, codes]
    torch.testing.assert_close(head(toy.hidden), expected, rtol=1e-4, atol=1e-4)
    if init == "contiguous":
        assert torch.equal(codes, torch.arange(256) // 32)


def test_each_repair_lowers_the_divergence(toy: Toy) -> None:
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)

    def kl(spec: VQ) -> float:
        with torch.no_grad():
            mine = fitted(spec, toy)(toy.hidden).log_softmax(-1)
        return float((dense.exp() * (dense - mine)).sum(-1).mean())

    published = kl(VQ(codes=32))
    assert kl(VQ(codes=32, metric="activation")) < published
    assert kl(VQ(codes=32, singletons=8)) < published
    assert kl(VQ(codes=32, bias="fitted")) < published
    assert kl(VQ.repaired(codes=32)) < 0.8 * published


def test_singletons_keep_their_rows(toy: Toy) -> None:
    head = fitted(VQ(codes=32, singletons=10), toy)
    counts = toy.stats.token_counts
    alone = torch.bincount(head.codes.long(), minlength=32)[head.codes.long()] == 1
    frequent = counts.argsort(descending=True)[:10]
    assert alone[frequent].all()
    torch.testing.assert_close(head.weight[head.codes[frequent].long()], toy.weight[frequent])


def test_prior_bias_leaves_each_code_its_mass(toy: Toy) -> None:
    head = fitted(VQ(codes=16, bias="prior"), toy)
    assert head.bias is not None
    codes, counts = head.codes.long(), toy.stats.token_counts.double() + toy.stats.mean_prob
    for code in range(16):
        mine = codes == code
        expected = (counts[mine] / counts[mine].sum() * mine.sum()).log()
        torch.testing.assert_close(head.bias[mine].double(), expected, rtol=1e-4, atol=1e-4)


def test_fitted_bias_matches_every_token_marginal(toy: Toy) -> None:
    head = fitted(VQ.repaired(codes=16), toy)
    found = head(toy.stats.states).softmax(-1).mean(0)
    torch.testing.assert_close(found, toy.stats.mean_prob, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("spec", [VQ(codes=16), VQ(codes=16, bias="prior"), VQ.repaired(codes=16)])
def test_floor_is_that_of_the_map_and_holds(spec: VQ, toy: Toy) -> None:
    head = fitted(spec, toy)
    codes, labels = head.codes.long(), toy.stats.labels
    sizes = torch.bincount(codes, minlength=16)
    floor = float(sizes[codes[labels]].double().log().mean())
    assert int(head.floor[0]) == pytest.approx(1e6 * floor, rel=1e-5)
    if head.bias is not None:
        within = torch.zeros(16).index_add(0, codes, head.bias.detach().exp())
        floor = float((within[codes].log() - head.bias)[labels].detach().mean())
        assert int(head.floor[1]) == pytest.approx(1e6 * floor, rel=1e-3)
    assert f"{math.exp(floor):.2f}" in " ".join(head.notes())
    # Even a codebook trained on these very states for these very labels stays above it.
    trained = torch.optim.Adam([head.weight], lr=0.1)
    for _ in range(60):
        trained.zero_grad()
        loss = head.token_loss(toy.stats.states, labels).mean()
        loss.backward()
        trained.step()
    assert float(loss.detach()) > floor


def test_reassign_undoes_a_scrambled_map(toy: Toy) -> None:
    head = fitted(VQ(codes=16), toy)
    right = head.codes.clone()
    head.codes.copy_(right.roll(1))
    assert reassign(head, toy.weight) > 0
    assert (head.codes == right).float().mean() > 0.99
    assert reassign(head, toy.weight) == 0


def test_reassign_keeps_singletons_and_mean_logits(toy: Toy) -> None:
    head = fitted(VQ.repaired(codes=32), toy)
    assert head.bias is not None
    with torch.no_grad():
        head.weight.add_(
            0.3 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    before, mean = head.codes.clone(), toy.stats.mean.float()
    logits = head(mean)
    assert reassign(head, toy.weight, toy.stats) > 0
    assert torch.equal(head.codes < 8, before < 8)
    assert (torch.bincount(head.codes.long(), minlength=32) > 0).all()
    torch.testing.assert_close(head(mean), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_empty_codes_are_never_drawn(bias: bool, toy: Toy) -> None:
    head = VQHead(16, 40, 8, bias=bias)
    head.reset_parameters()
    head.codes.copy_(torch.arange(40) % 3 * 3)  # codes 0, 3 and 6; 1, 2, 4, 5, 7 are empty
    hidden = toy.hidden[:50]
    expected = head(hidden).log_softmax(-1)
    labels = torch.arange(50) % 40
    torch.testing.assert_close(
        head.log_prob(hidden, labels), expected.gather(1, labels[:, None]).squeeze(1)
    )
    values, tokens = head.topk(hidden, 20)
    torch.testing.assert_close(values, head(hidden).topk(20).values)
    assert (tokens.sort(-1).values.diff(dim=-1) > 0).all()
    drawn = head.sample(hidden[0].expand(4000, -1), generator=torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn, minlength=40) / 4000
    torch.testing.assert_close(frequency, expected[0].exp(), rtol=0, atol=0.03)
    head.token_loss(hidden, labels).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("codes", "dtype"), [(256, torch.uint8), (257, torch.int16), (40_000, torch.int32)]
)
def test_codes_are_stored_in_the_smallest_type(codes: int, dtype: torch.dtype) -> None:
    assert VQHead(4, 50_000, codes, bias=False).codes.dtype == dtype


def test_dense_bias_is_kept(toy: Toy) -> None:
    bias = torch.linspace(-1, 1, 256)
    head = VQ(codes=8).module(16, 256, bias=True)
    VQ(codes=8).fit(head, toy.weight, bias, None)
    plain = fitted(VQ(codes=8), toy, stats=False)
    torch.testing.assert_close(head(toy.hidden), plain(toy.hidden) + bias)


@pytest.mark.parametrize("codes", [256, 1000])
def test_refuses_impossible_codes(codes: int) -> None:
    with pytest.raises(ValueError, match=f"asked for {codes} codes for 256 tokens; 1 to 255"):
        VQ(codes=codes).check(16, 256)


@pytest.mark.parametrize("singletons", [8, 9])
def test_refuses_impossible_singletons(singletons: int) -> None:
    with pytest.raises(ValueError, match="singleton codes of 8; 0 to 7"):
        VQ(codes=8, singletons=singletons).check(16, 256)


@pytest.mark.parametrize(
    "spec",
    [VQ(8, bias="prior"), VQ(8, bias="fitted"), VQ(8, singletons=2), VQ(8, metric="activation")],
)
def test_repairs_need_statistics(spec: VQ, toy: Toy) -> None:
    with pytest.raises(ValueError, match=r"needs statistics.*sh\.collect"):
        fitted(spec, toy, stats=False)


def test_refuses_weights_with_nan(toy: Toy) -> None:
    weight = toy.weight.clone()
    weight[3, 2] = float("nan")
    with pytest.raises(
        ValueError, match="1 of 256 output rows hold NaN or inf, the first is row 3"
    ):
        VQ(codes=8).fit(VQ(codes=8).module(16, 256), weight, None, None)


def test_unknown_transform_is_refused_but_scores_work(toy: Toy) -> None:
    head = fitted(VQ(codes=8), toy)
    head.transform = None
    assert head(toy.hidden[:2]).shape == (2, 256)
    for method in (head.logsumexp, lambda h: head.topk(h, 1), head.sample):
        with pytest.raises(NotImplementedError, match="only model"):
            method(toy.hidden[:2])


def test_gumbel_softmax_learns_the_map(toy: Toy) -> None:
    dense = (toy.hidden @ toy.weight.T).log_softmax(-1)

    def divergence(head: VQHead) -> float:
        mine = head(toy.hidden).log_softmax(-1)
        return float((dense.exp() * (dense - mine)).sum(-1).mean().detach())

    head = fitted(VQ(24, init="random"), toy)
    before, codes = divergence(head), head.codes.clone()
    moved = learn_assignment(head, toy.weight, toy.stats, steps=150, codebook_lr=0.01)
    assert moved == int((head.codes != codes).sum()) > 100
    assert divergence(head) < 0.6 * before
    assert torch.bincount(head.codes.long(), minlength=24).min() > 0
    again = fitted(VQ(24, init="random"), toy)
    learn_assignment(again, toy.weight, toy.stats, steps=150, codebook_lr=0.01)
    assert torch.equal(again.codes, head.codes)  # deterministic under its seed


def test_a_map_that_learning_did_not_improve_is_put_back(toy: Toy) -> None:
    head = fitted(VQ.repaired(32), toy)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    assert learn_assignment(head, toy.weight, toy.stats, steps=5, codebook_lr=10.0) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_learning_keeps_singletons(toy: Toy) -> None:
    head = fitted(VQ.repaired(32), toy)
    alone = (head.codes.long() < 8).nonzero().flatten()
    codes, rows = head.codes[alone].clone(), head.weight[:8].clone()
    learn_assignment(head, toy.weight, toy.stats, steps=20, tokens=64)
    assert torch.equal(head.codes[alone], codes)
    assert torch.equal(head.weight[:8], rows)


@pytest.mark.parametrize(
    "steps",
    [(("mul", -0.5),), (("div", -2.0), ("tanh", 1.0), ("mul", 3.0))],
    ids=["scale", "soft cap"],
)
@pytest.mark.parametrize("spec", [VQ(16), VQ.repaired(16)], ids=["published", "repaired"])
def test_a_transform_that_decreases_turns_the_order(
    spec: VQ, steps: tuple[tuple[str, float], ...], toy: Toy
) -> None:
    """The best token is then the one of the lowest score, which the shortcuts among codes must not miss."""
    head = fitted(spec, toy)
    head.transform = LogitTransform(steps)
    logits = head.transform(head(toy.hidden).float())
    for k in (1, 5):
        values, tokens = head.topk(toy.hidden, k)
        torch.testing.assert_close(values, logits.topk(k, -1).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.gather(-1, tokens), values, rtol=1e-5, atol=1e-5)
    expected = logits.log_softmax(-1).gather(-1, toy.labels[:, None]).squeeze(-1)
    torch.testing.assert_close(
        head.log_prob(toy.hidden, toy.labels), expected, rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_the_temperature_holds_within_a_code_too(temperature: float) -> None:
    """Two codes of four tokens each, whose biases alone tell them apart."""
    head = VQHead(2, 8, 2, bias=True)
    assert head.bias is not None
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        head.bias.copy_(torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -0.5, 1.5, 0.0]))
    head.codes.copy_(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    draws, hidden = 20_000, torch.tensor([0.3, -0.2])
    drawn = head.sample(
        hidden.expand(draws, -1),
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    p = (head(hidden) / temperature).softmax(-1).detach()
    found = torch.bincount(drawn, minlength=8) / draws
    assert ((found - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()


@pytest.mark.parametrize("options", [{"candidates": 1}, {"candidates": 33}, {"steps": 0}])
def test_learning_refuses_impossible_options(options: dict[str, int], toy: Toy) -> None:
    head = fitted(VQ(32), toy)
    with pytest.raises(ValueError, match="2 to 32 candidates"):
        learn_assignment(head, toy.weight, toy.stats, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [VQ(16), Dense()], ids=lambda s: s.name)
def test_resize_keeps_a_dense_bias(spec: VQ | Dense, toy: Toy) -> None:
    """New tokens get its mean, like the mean row that a dense head gives them."""
    bias = torch.linspace(-3, 2, 256)
    head = spec.module(16, 256, bias=True)
    spec.fit(head, toy.weight, bias, None)
    for vocab in (300, 200):
        new = head.resize(vocab)
        kept = min(vocab, 256)
        torch.testing.assert_close(new(toy.hidden)[:, :kept], head(toy.hidden)[:, :kept])
        assert torch.equal(new.bias[:kept], bias[:kept])  # type: ignore[index]
        torch.testing.assert_close(new.bias[kept:], bias.mean().expand(vocab - kept))  # type: ignore[index]


@pytest.mark.parametrize("spec", [VQ(16), VQ.repaired(32)], ids=["published", "repaired"])
def test_resize_keeps_the_old_tokens(spec: VQ, toy: Toy) -> None:
    head = fitted(spec, toy)
    for vocab in (300, 200):
        new = head.resize(vocab)
        kept = min(vocab, 256)
        assert new(toy.hidden).shape == (len(toy.hidden), vocab)
        assert torch.equal(new(toy.hidden)[:, :kept], head(toy.hidden)[:, :kept])
        assert new.perplexity_floor is None
    grown = head.resize(300)(toy.hidden)[:, 256:]
    assert torch.equal(grown, grown[:, :1].expand_as(grown))
    assert (head.resize(300).codes[256:] >= spec.singletons).all()
