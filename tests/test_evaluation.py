"""`collect`, `evaluate` and the windows they read, against plain definitions."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

import hf_softheads as sh
from hf_softheads.bridge import SplitModel
from hf_softheads.heads.fit import hessian
from hf_softheads.heads.fit.hessian import local_moments
from hf_softheads.heads.stats import HeadStats
from hf_softheads.measure.calibration import _Reservoir
from hf_softheads.measure.divergence import from_dense
from hf_softheads.plan import dense_head
from hf_softheads.text.windows import windows

from .conftest import VOCAB, make_model


class Letters:
    """A tokenizer of one token per letter."""

    bos_token_id = 1

    def __call__(self, texts, **_):
        return {"input_ids": [[3 + ord(c) % (VOCAB - 3) for c in text] for text in texts]}


TEXT = "the quick brown fox jumps over the lazy dog " * 6


@pytest.fixture
def model():
    return make_model("gemma2")  # a soft cap after the head


def near(value, rel=1e-6):
    return pytest.approx(float(value), rel=rel)


def plain_loss(model, rows):
    with torch.no_grad():
        logits = model(rows).logits[:, :-1].double()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")


def test_strict_perplexity(model):
    rows = torch.randint(3, VOCAB, (5, 16), generator=torch.Generator().manual_seed(0))
    loss = plain_loss(model, rows)
    found = sh.evaluate(model, rows, batch_size=2)
    assert found.tokens == 75
    assert found.perplexity == near(math.exp(loss.mean()), rel=1e-5)
    assert found.standard_error == near(loss.std(unbiased=False) / math.sqrt(75), rel=1e-4)
    assert found.bits_per_byte is None
    assert dataclasses.asdict(found) == json.loads(found.to_json())
    assert f"{found.perplexity:.3f}" in str(found)


def test_reference(model):
    rows = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    other = make_model("gemma2", seed=5)
    with torch.no_grad():
        mine, theirs = (m(rows).logits[:, :-1].double() for m in (model, other))
    found = sh.evaluate(model, rows, reference=other)
    p, q = mine.log_softmax(-1), theirs.log_softmax(-1)
    assert found.kl == near((q.exp() * (q - p)).sum(-1).mean(), rel=1e-4)
    assert found.top1 == near((mine.argmax(-1) == theirs.argmax(-1)).double().mean())
    five = [
        len(set(a.tolist()) & set(b.tolist())) / 5
        for a, b in zip(
            mine.flatten(0, 1).topk(5).indices, theirs.flatten(0, 1).topk(5).indices, strict=True
        )
    ]
    assert found.top5 == near(sum(five) / len(five))
    assert found.reference_perplexity == near(math.exp(plain_loss(other, rows).mean()), rel=1e-5)
    difference = (plain_loss(model, rows) - plain_loss(other, rows)).flatten()
    assert found.ratio == near(math.exp(difference.mean()), rel=1e-4)
    error = difference.std(correction=0) / len(difference) ** 0.5
    assert found.ratio_error == near(found.ratio * float(error), rel=1e-3)


def test_the_dense_head_as_reference(model):
    rows = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    dense = make_model("gemma2")
    sh.patch(model, head=sh.heads.VQ(codes=24))
    mine = sh.evaluate(model, rows, reference=dense_head(model))
    whole = sh.evaluate(model, rows, reference=dense)
    assert mine.kl == near(whole.kl, rel=1e-5)
    assert mine.kl > 0.01
    with pytest.raises(ValueError, match="reference has 7 tokens, the model 96"):
        sh.evaluate(model, rows, reference=torch.nn.Linear(32, 7))


def test_distance_from_the_dense_head(model):
    """`KL(dense ‖ head)`, not the other way round, and the share of equal best tokens; under the family's soft cap."""
    dense = make_model("gemma2")
    head = sh.patch(model, head=sh.heads.VQ(codes=24)).get_output_embeddings()
    states = 3 * torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    weight = dense.lm_head.weight.detach()
    with torch.no_grad():
        kl, agreement = from_dense(head, weight, None, states)
        z = 30 * torch.tanh(states.double() @ weight.double().T / 30)
        p, q = z.log_softmax(-1), head.logits(states).double().log_softmax(-1)
    assert kl == near((p.exp() * (p - q)).sum(-1).mean(), rel=1e-4)
    assert kl != near((q.exp() * (q - p)).sum(-1).mean(), rel=1e-2)
    assert agreement == near((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_sliding_window_counts_every_token_once():
    stream = torch.arange(50)
    rows = windows(stream, window=16, stride=5)
    counted = rows.labels[rows.labels != -100]
    assert sorted(counted.tolist()) == list(range(1, 50))
    for ids, labels in zip(rows.input_ids, rows.labels, strict=True):
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        first = int((labels != -100).nonzero()[0])
        assert first >= 16 - 5 or ids[0] == 0


def test_sliding_window_perplexity(model):
    stream = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(0))
    losses = []
    for end in range(
        1, 40
    ):  # windows of 16 tokens that move by 5, each token in the first that holds it
        start = next(s for s in [*range(0, 25, 5), 24] if s + 16 > end)
        row = stream[start : start + 16][None]
        losses.append(plain_loss(model, row)[end - start - 1])
    found = sh.evaluate(model, stream, window=16, stride=5)
    assert found.tokens == 39
    assert found.loss == near(torch.stack(losses).mean(), rel=1e-5)


def test_text_in_every_form(model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    wanted = sh.evaluate(model, TEXT, Letters(), window=16)
    for data in (file, [TEXT], Dataset.from_dict({"text": [TEXT]})):
        assert sh.evaluate(model, data, Letters(), window=16) == wanted
    tokens = torch.tensor([1, *Letters()([TEXT])["input_ids"][0]])
    same = sh.evaluate(model, Dataset.from_dict({"input_ids": [tokens.tolist()]}), window=16)
    assert same.loss == wanted.loss
    # one token a byte, and a BOS token that is not predicted and has no byte
    assert wanted.bits_per_byte == near(wanted.loss / math.log(2))


def test_padding_is_not_counted(model):
    rows = torch.randint(3, VOCAB, (1, 10), generator=torch.Generator().manual_seed(0))
    padded = F.pad(rows, (4, 0))
    mask = F.pad(torch.ones_like(rows), (4, 0))
    mine = sh.evaluate(model, {"input_ids": padded, "attention_mask": mask})
    alone = sh.evaluate(model, rows)
    assert mine.tokens == alone.tokens
    assert mine.loss == near(alone.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "the text is empty"),
        ([" ", "\n"], "the text is empty"),
        ("short", "6 tokens, less than one window of 16"),
        (Dataset.from_dict({"body": ["x"]}), "no 'text' column, only"),
        ([3, 4], "expected text, got int"),
    ],
)
def test_data_that_will_not_do(model, data, message):
    with pytest.raises(ValueError, match=message):
        sh.evaluate(model, data, Letters(), window=16)


def test_other_wrong_inputs(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text file"):
        sh.evaluate(model, tmp_path / "none.txt", Letters())
    with pytest.raises(ValueError, match="text needs tokenizer="):
        sh.evaluate(model, TEXT)
    with pytest.raises(ValueError, match="stride ≤ window"):
        sh.evaluate(model, TEXT, Letters(), window=16, stride=20)


# -- collect -----------------------------------------------------------------------------------------------------------


def test_statistics(model):
    rows = torch.randint(3, VOCAB, (7, 16), generator=torch.Generator().manual_seed(0))
    stats = sh.collect(model, rows, batch_size=2, states=1000)
    reader = SplitModel(model)
    with torch.no_grad():
        hidden = reader.hidden(input_ids=rows)[:, :-1].flatten(0, 1).double()
        p = model(rows).logits[:, :-1].flatten(0, 1).double().softmax(-1)
    n = len(hidden)
    assert stats.tokens == n == 105
    torch.testing.assert_close(stats.second_moment, hidden.T @ hidden / n)
    torch.testing.assert_close(stats.mean, hidden.mean(0))
    torch.testing.assert_close(stats.covariance, torch.cov(hidden.T, correction=0))
    assert torch.equal(stats.token_counts, torch.bincount(rows[:, 1:].flatten(), minlength=VOCAB))
    torch.testing.assert_close(stats.mean_prob.double(), p.mean(0), atol=1e-6, rtol=1e-4)
    smooth = 0.9 * p + 0.1 / VOCAB
    curvature = (smooth * (1 - smooth)).mean(0)
    torch.testing.assert_close(stats.curvature.double(), curvature, atol=1e-6, rtol=1e-4)
    weighted = (p.T @ hidden) / p.sum(0)[:, None]
    weighted = weighted.float().bfloat16().double()
    torch.testing.assert_close(stats.prob_weighted_mean.double(), weighted, atol=1e-4, rtol=2**-8)
    assert stats.states.shape == (n, 32)
    assert torch.equal(stats.labels.sort().values, rows[:, 1:].flatten().sort().values)


def test_sampled_states_are_uniform_and_repeatable(model):
    rows = torch.randint(3, VOCAB, (64, 16), generator=torch.Generator().manual_seed(0))
    first, second = (sh.collect(model, rows, states=100, seed=s) for s in (0, 0))
    other = sh.collect(model, rows, states=100, seed=1)
    assert torch.equal(first.states, second.states)
    assert not torch.equal(first.states, other.states)
    assert first.states.shape == (100, 32)


@pytest.mark.parametrize("batch", [1, 7, 100, 4000])
def test_a_reservoir_takes_every_part_of_the_stream_alike(batch):
    """400 of 4,000 items: each eighth of the stream gives 50, up to 5 of its standard deviations."""
    reservoir, stream = _Reservoir(400, seed=3), torch.arange(4000)
    for part in stream.split(batch):
        reservoir.add(part.float()[:, None], part)
    items, labels = reservoir.result()
    assert torch.equal(items[:, 0].long(), labels)  # an item keeps its label
    assert len(labels.unique()) == 400
    share = torch.bincount(labels // 500, minlength=8)
    deviation = math.sqrt(400 * (1 / 8) * (7 / 8) * (3600 / 3999))
    assert (share - 50).abs().max() < 5 * deviation
    prefix = torch.bincount(labels[:200] // 2000, minlength=2)  # a prefix is a sample too
    assert (prefix - 100).abs().max() < 5 * math.sqrt(200 * 0.25)


def test_statistics_on_disk(model, tokens, tmp_path, monkeypatch):
    stats = sh.collect(model, tokens)
    weight = model.lm_head.weight
    labels, moments = local_moments(stats, weight, 4)
    stats.save(tmp_path / "stats.safetensors")
    again = HeadStats.load(tmp_path / "stats.safetensors")
    assert again.tokens == stats.tokens
    assert torch.equal(again.states, stats.states)
    with monkeypatch.context() as patch:
        patch.setattr(hessian, "kmeans", None)  # found once: not asked for again
        for known in (stats, again):
            found = local_moments(known, weight, 4)
            assert torch.equal(found[0], labels)
            assert torch.equal(found[1], moments)
    assert not torch.equal(local_moments(again, weight + 1, 4)[1], moments)
    assert not dataclasses.replace(stats, states=stats.states[:50]).contexts
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no head statistics"):
        HeadStats.load(tmp_path / "model" / "model.safetensors")


def test_statistics_of_a_patched_model_are_refused(model, tokens):
    sh.patch(model, head=sh.heads.VQ(codes=24))
    with pytest.raises(ValueError, match="patched already"):
        sh.collect(model, tokens)
