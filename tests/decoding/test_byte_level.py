"""The law of bytes against an enumeration of every text that a small model of tokens can write."""

from __future__ import annotations

import codecs
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import hf_softheads as sh
from hf_softheads.decoding.byte_level import END, token_bytes

DEPTH = 3  # tokens of the longest text


def fast(raw: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def byte_level() -> Any:
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "aba": 5, "ba": 6}
    raw = Tokenizer(models.BPE(vocab, [("a", "b"), ("b", "a"), ("ab", "a")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return fast(raw)


def sentence_piece() -> Any:
    """With `▁` before every text, and bytes for what has no piece."""
    vocab = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "▁a": 4, "<0xC3>": 5, "<0xA9>": 6, "aa": 7}
    merges = [("▁", "a"), ("a", "a")]
    raw = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return fast(raw)


def unigram() -> Any:
    pieces = [
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("a", -1.0),
        ("b", -1.5),
        ("ab", -1.2),
        ("▁", -2.0),
        ("b▁", -2.1),
    ]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Replace("▁", " ")
    return fast(raw)


class Toy:
    """Next-token logits from the last two tokens; after `DEPTH` tokens the text ends."""

    device = torch.device("cpu")

    def __init__(self, vocab: int, seed: int = 0):
        self.table = torch.randn(vocab, vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.calls = 0

    def __call__(self, ids: Tensor) -> Any:
        self.calls += 1
        *_, before, last = [0, *ids[0].tolist()]
        logits = self.table[before, last].clone()
        if ids.shape[1] > DEPTH:
            logits[2:] = -torch.inf
        return SimpleNamespace(logits=logits.view(1, 1, -1))

    def law(self, ids: tuple[int, ...]) -> Tensor:
        logits = self(torch.tensor([[0, *ids]])).logits[0, 0].double()
        logits[0] = -torch.inf  # it starts a text and has no bytes
        return logits.softmax(-1)


def every_text(model: Toy, tokenizer: Any, canonical: bool) -> dict[bytes, float]:
    """Probability of each whole text; of tokenizations that the tokenizer would write, or of all."""
    table, found = token_bytes(tokenizer), defaultdict(float)
    size = model.table.shape[0]
    for length in range(DEPTH + 1):
        for ids in itertools.product(range(2, size), repeat=length):
            p = 1.0
            for i, token in enumerate((*ids, 1)):
                p *= float(model.law(ids[:i])[token])
            raw = b"".join(table[t] for t in ids)
            found[raw] += p
    return dict(found)


def next_by_enumeration(texts: dict[bytes, float], prefix: bytes) -> Tensor:
    found = torch.zeros(257, dtype=torch.float64)
    for raw, p in texts.items():
        if raw.startswith(prefix):
            found[raw[len(prefix)] if len(raw) > len(prefix) else END] += p
    return found / found.sum()


@pytest.mark.parametrize(
    ("make", "prefixes"),
    [(byte_level, [b"", b"a", b"ab", b"abab"]), (unigram, [b"", b"a", b"ab", b"ab "])],
)
def test_every_segmentation_by_enumeration(make, prefixes):
    tokenizer = make()
    model = Toy(7)
    texts = every_text(model, tokenizer, False)
    assert math.isclose(sum(texts.values()), 1, abs_tol=1e-9)
    law = sh.decoding.ByteLevel(model, tokenizer, canonical=False)
    for prefix in prefixes:
        expected = next_by_enumeration(texts, prefix)
        torch.testing.assert_close(law.next_byte(prefix), expected, atol=1e-9, rtol=1e-7)
    total = sum(p for raw, p in texts.items() if raw.startswith(b"aba"))
    if total:
        assert math.isclose(law.log_prob("aba"), math.log(total), rel_tol=1e-7)


@pytest.mark.parametrize("make", [byte_level, sentence_piece, unigram])
def test_canonical_law_by_covers(make):
    """The definition: every canonical sequence whose last token is the first to reach the end of `x b`."""
    tokenizer = make()
    table = token_bytes(tokenizer)
    size = len(tokenizer)
    model = Toy(size)
    lead = b" " if make is sentence_piece else b""
    law = sh.decoding.ByteLevel(model, tokenizer, tolerance=0)

    def canonical(ids: tuple[int, ...]) -> bool:
        raw = b"".join(table[t] for t in ids)
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(raw)
        except UnicodeDecodeError:
            return False  # no text starts so
        if text.encode() != raw:
            return True  # inside a character
        if not raw.startswith(lead):
            return False
        if raw == lead:
            return True  # of a text that goes on
        return tuple(tokenizer(text[len(lead) :], add_special_tokens=False).input_ids) == ids

    def prefixes_canonical(ids: tuple[int, ...]) -> bool:
        return all(canonical(ids[: i + 1]) for i in range(len(ids)))

    for prefix in (b"", b"a", b"aa") if make is sentence_piece else (b"", b"a", b"ab"):
        text = lead + prefix
        expected = torch.zeros(257, dtype=torch.float64)
        for length in range(DEPTH + 1):
            for ids in itertools.product(sorted(table), repeat=length):
                raw = b"".join(table[t] for t in ids)
                before = raw[: len(raw) - len(table[ids[-1]])] if ids else b""
                p = math.prod(float(model.law(ids[:i])[t]) for i, t in enumerate(ids))
                if not prefixes_canonical(ids):
                    continue
                if raw == text != lead or (text == lead and not ids):
                    expected[END] += p * float(model.law(ids)[1])
                if len(raw) > len(text) >= len(before) and raw.startswith(text):
                    expected[raw[len(text)]] += p
        found = law.next_byte(prefix)
        torch.testing.assert_close(found, expected / expected.sum(), atol=1e-9, rtol=1e-7)


def test_the_next_tokens_marginal_is_another_law():
    """Why covers are needed: after `a` the tokens `ab`, `aba` are impossible for plain decoding of [a]."""
    tokenizer = byte_level()
    model = Toy(7)
    law = sh.decoding.ByteLevel(model, tokenizer, canonical=False).next_byte("a")
    table = token_bytes(tokenizer)
    naive = torch.zeros(257, dtype=torch.float64)
    for token, p in enumerate(model.law((2,))):
        naive[table[token][0] if token in table else END] += p
    assert float((naive - law).abs().sum()) > 0.1


def test_a_prefix_that_ends_inside_a_character():
    law = sh.decoding.ByteLevel(Toy(8), sentence_piece(), tolerance=0)
    assert law.next_byte(b"\xc3")[0xA9] > 0.5
    with pytest.raises(ValueError, match=r"no UTF-8 text starts with b'\\xa9'"):
        law.next_byte(b"\xa9")


def test_completion_goes_on_from_inside_a_token_and_reuses_its_contexts():
    model = Toy(7)
    law = sh.decoding.ByteLevel(model, byte_level(), canonical=False)
    found = law.complete("ab", 3)
    text = b"ab"
    for byte in found:
        assert int(law.next_byte(text).argmax()) == byte
        text += bytes([byte])
    before = model.calls
    law.next_byte(b"ab")
    assert model.calls == before
    drawn = {
        law.complete("a", 1, sample=True, generator=torch.Generator().manual_seed(i))
        for i in range(20)
    }
    assert len(drawn) > 1


def test_an_ensemble_of_other_vocabularies_is_the_mean():
    laws = [
        sh.decoding.ByteLevel(Toy(7), byte_level()),
        sh.decoding.ByteLevel(Toy(7, 1), unigram()),
    ]
    mean = sh.decoding.ByteLevel.ensemble(laws, [3, 1])
    expected = 0.75 * laws[0].next_byte("a") + 0.25 * laws[1].next_byte("a")
    torch.testing.assert_close(mean.next_byte("a"), expected)
    with pytest.raises(ValueError, match="one law or more"):
        sh.decoding.ByteLevel.ensemble([])
    with pytest.raises(ValueError, match="a weight of at least 0"):
        sh.decoding.ByteLevel.ensemble(laws, [1, -1])


def test_tokenizers_that_are_not_understood():
    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>"))
    with pytest.raises(ValueError, match="the bytes of this tokenizer's tokens are not known"):
        sh.decoding.ByteLevel(Toy(3), fast(raw))


@pytest.mark.slow
def test_the_embedded_model():
    model, tokenizer = sh.embedded.load_embedded()
    law = sh.decoding.ByteLevel(model, tokenizer, tolerance=1e-3)
    found = law.next_byte("import o")
    assert math.isclose(float(found.sum()), 1, abs_tol=1e-9)
    assert float(found[torch.tensor([ord(c) for c in "sprnf"])].sum()) > 0.8
