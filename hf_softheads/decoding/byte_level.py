"""The law of a text's bytes under a model of tokens."""

from __future__ import annotations

import codecs
import json
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

END = 256  # the place of the end of the text among the 257
_REMEMBERED = 256  # contexts whose next-token law is kept
_CHECKED = 512  # tokens that are encoded at once

Ids = tuple[int, ...]


class ByteLaw:
    """Something that gives the next byte's probabilities; what follows from them."""

    def next_byte(self, prefix: bytes | str) -> Tensor:
        """`(257,)` fp64: the probability of each next byte, and at 256 that the text ends."""
        raise NotImplementedError

    def log_prob(self, text: bytes | str) -> float:
        """Log-probability that a text starts with these bytes, in nats."""
        raw = _as_bytes(text)
        steps = (self.next_byte(raw[:i])[byte] for i, byte in enumerate(raw))
        return float(sum(p.log() for p in steps)) if raw else 0.0

    def complete(
        self,
        prefix: bytes | str,
        max_bytes: int = 64,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> bytes:
        """Up to `max_bytes` bytes after a prefix that may end inside a token: the likeliest, or drawn one by one."""
        text = start = _as_bytes(prefix)
        while len(text) - len(start) < max_bytes:
            law = self.next_byte(text)
            byte = int(torch.multinomial(law, 1, generator=generator) if sample else law.argmax())
            if byte == END:
                break
            text += bytes([byte])
        return text[len(start) :]


class ByteLevel(ByteLaw):
    """`P(next byte | bytes so far)` of the text that a causal model writes, whatever its tokens (arXiv 2410.09303).

        law = sh.decoding.ByteLevel(model, tokenizer)
        law.next_byte("impor")          # (257,): the bytes, and the end of the text
        law.complete("import nump")     # where a tokenizer would have split "numpy" otherwise

    A prefix is covered by token sequences whose last token is the first to reach its end: `P(x) = Σ P(t)` over these
    covers, and the next byte is `P(x b) / P(x)`. The model's special and added tokens have no bytes: they are left out,
    the end-of-text token ends the text. One forward pass for each byte, with the sequence so far.

    Two laws. `canonical`: only sequences that the tokenizer itself would write count, and each byte's law is normalised
    (another model than the one given, as far as that writes others): one context a byte. `canonical=False`: every
    sequence of tokens that spells the bytes, exactly; their number grows exponentially, so for short texts.

    Byte-level BPE, and BPE or Unigram with `▁` (SentencePiece) with or without byte tokens `<0x..>`.

    Attributes:
        canonical: see above.
        tolerance: of each context's next tokens, the least likely that hold no more than this together are not asked
            for whether the tokenizer would write them; 0 asks for all. Only with `canonical`.

    Raises:
        ValueError: another kind of tokenizer, or one without a token to start from; a prefix that is no UTF-8.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, canonical: bool = True, tolerance: float = 1e-5
    ):
        self.model, self.tokenizer = model, tokenizer
        self.canonical, self.tolerance = canonical, tolerance
        table = token_bytes(tokenizer)
        self._bytes = table
        by_bytes = sorted((spelled, token) for token, spelled in table.items())
        self._spelled = [spelled for spelled, _ in by_bytes]
        self._tokens = torch.tensor([token for _, token in by_bytes])
        self._longest = max(map(len, self._spelled))
        self._end = tokenizer.eos_token_id
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self._end
        if start is None:
            raise ValueError(
                "the tokenizer has neither a token that begins a text nor one that ends it, so the first byte has no "
                "context; set tokenizer.bos_token"
            )
        self._start = int(start)
        self._lead = _lead(tokenizer, table)
        self._laws: OrderedDict[Ids, Tensor] = OrderedDict()
        self._prefix = b""
        self._contexts: list[dict[Ids, float]] = [{(): 0.0}]  # by how many bytes they spell

    @staticmethod
    def ensemble(laws: Sequence[ByteLaw], weights: Sequence[float] | None = None) -> ByteLaw:
        """The mean of several laws, of models whose vocabularies may differ; `weights` are not negative."""
        return _Mean(laws, weights)

    def next_byte(self, prefix: bytes | str) -> Tensor:
        text = self._lead + _as_bytes(prefix)
        self._advance(text)
        n = len(text)
        logs: list[Tensor] = []
        places: list[Tensor] = []
        for at in range(max(0, n - self._longest), n + 1):
            first, last = self._starting(text[at:])
            for ids, log_p in self._contexts[at].items() if first < last else ():
                law = self._law(ids)
                which = torch.tensor(
                    [i for i in range(first, last) if len(self._spelled[i]) > n - at],
                    dtype=torch.long,
                )
                logs.append(log_p + law[self._tokens[which]])
                if self.canonical:
                    logs[-1] = self._only_canonical(ids, which, logs[-1])
                places.append(
                    torch.tensor([self._spelled[i][n - at] for i in which.tolist()]).long()
                )
                if self._end is not None and self._is_whole(ids, at, n):
                    logs.append(log_p + law[self._end : self._end + 1])
                    places.append(torch.tensor([END]))
        joint = torch.cat(logs) if logs else torch.zeros(0, dtype=torch.float64)
        if not bool((joint > -torch.inf).any()):
            raise ValueError(
                f"no sequence of the tokenizer's tokens spells {prefix!r} and goes on; the text may hold what its "
                "normalizer changes"
            )
        found = torch.zeros(END + 1, dtype=torch.float64)
        found.index_add_(0, torch.cat(places), (joint - joint.max()).exp())
        return found / found.sum()

    def _is_whole(self, ids: Ids, at: int, n: int) -> bool:
        """Whether the tokenizer writes a context for all of a text of n bytes; for an empty text it writes nothing."""
        return not ids if n == len(self._lead) else at == n

    def _advance(self, text: bytes) -> None:
        """The contexts that spell the first 0, 1, … bytes of a text."""
        shared = 0
        for a, b in zip(self._prefix, text, strict=False):
            if a != b:
                break
            shared += 1
        del self._contexts[shared + 1 :]
        self._prefix = text
        for n in range(len(self._contexts), len(text) + 1):
            found: dict[Ids, float] = {}
            for at in range(max(0, n - self._longest), n):
                piece = text[at:n]
                first, last = self._starting(piece)
                tokens = [
                    int(self._tokens[i]) for i in range(first, last) if self._spelled[i] == piece
                ]
                for ids, log_p in self._contexts[at].items() if tokens else ():
                    for token in tokens:
                        if not self.canonical or self._is_canonical([(*ids, token)])[0]:
                            found[(*ids, token)] = log_p + float(self._law(ids)[token])
            self._contexts.append(found)

    def _starting(self, piece: bytes) -> tuple[int, int]:
        """Where the tokens that start with a piece stand in `_spelled`."""
        if not piece:
            return 0, len(self._spelled)
        after = piece.rstrip(b"\xff")
        first = bisect_left(self._spelled, piece)
        if not after:
            return first, len(self._spelled)
        return first, bisect_left(self._spelled, after[:-1] + bytes([after[-1] + 1]))

    def _only_canonical(self, ids: Ids, which: Tensor, logs: Tensor) -> Tensor:
        """-inf for next tokens that the tokenizer would not write there, and for the least likely."""
        order = logs.argsort(descending=True)
        share = (logs - logs.logsumexp(0)).exp()[order]
        checked = (
            int((share.cumsum(0) - share < 1 - self.tolerance).sum())
            if self.tolerance
            else len(order)
        )
        kept = torch.full_like(logs, -torch.inf)
        for part in order[:checked].split(_CHECKED):
            sequences = [(*ids, int(token)) for token in self._tokens[which[part]]]
            good = part[torch.tensor(self._is_canonical(sequences), dtype=torch.bool)]
            kept[good] = logs[good]
        return kept

    def _is_canonical(self, sequences: Sequence[Ids]) -> list[bool]:
        """Whether the tokenizer writes these tokens for what they spell; yes where that ends inside a character."""
        texts: list[str] = []
        asked: list[int] = []
        found = [True] * len(sequences)
        for i, ids in enumerate(sequences):
            raw = b"".join(self._bytes[token] for token in ids)
            try:
                text = codecs.getincrementaldecoder("utf-8")().decode(raw)
            except UnicodeDecodeError:
                found[i] = False
                continue
            if not raw.startswith(self._lead):
                found[i] = False
            elif text.encode() == raw != self._lead:
                asked.append(i)
                texts.append(text[len(self._lead) :])
        if texts:
            encoded = self.tokenizer(texts, add_special_tokens=False).input_ids
            for i, ids in zip(asked, encoded, strict=True):
                found[i] = tuple(ids) == sequences[i]
        return found

    @torch.no_grad()
    def _law(self, ids: Ids) -> Tensor:
        """`log P(next token | ids)`, fp64 on the CPU, over the tokens with bytes and the end of the text."""
        if ids in self._laws:
            self._laws.move_to_end(ids)
            return self._laws[ids]
        context = torch.tensor([[self._start, *ids]], device=self.model.device)
        logits = self.model(context).logits[0, -1].double().cpu()
        allowed = torch.full_like(logits, -torch.inf)
        allowed[self._tokens] = 0
        if self._end is not None:
            allowed[self._end] = 0
        law: Tensor = (logits + allowed).log_softmax(-1)
        self._laws[ids] = law
        if len(self._laws) > _REMEMBERED:
            self._laws.popitem(last=False)
        return law


class _Mean(ByteLaw):
    def __init__(self, laws: Sequence[ByteLaw], weights: Sequence[float] | None):
        given = [1.0] * len(laws) if weights is None else list(weights)
        if not laws or len(given) != len(laws) or min(given) < 0 or not sum(given) > 0:
            raise ValueError(
                f"an ensemble takes one law or more and a weight of at least 0 for each, got {len(laws)} laws and "
                f"weights {weights}"
            )
        self.laws, self.weights = laws, [weight / sum(given) for weight in given]

    def next_byte(self, prefix: bytes | str) -> Tensor:
        pairs = zip(self.laws, self.weights, strict=True)
        parts = [weight * law.next_byte(prefix) for law, weight in pairs]
        mean: Tensor = torch.stack(parts).sum(0)
        return mean


def _as_bytes(text: bytes | str) -> bytes:
    """Raises ValueError for bytes that no UTF-8 text starts with."""
    raw = text.encode() if isinstance(text, str) else text
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"no UTF-8 text starts with {raw!r}: {error.reason} at byte {error.start}; a prefix may end inside a "
            "character, but each byte must belong to one"
        ) from None
    return raw


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each token stands for; special and added tokens have none and are left out.

    Raises:
        ValueError: neither a byte-level nor a SentencePiece tokenizer with a fast implementation.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer; load one by AutoTokenizer.from_pretrained"
        )
    left_out = {*tokenizer.all_special_ids, *fast.get_added_tokens_decoder()}
    pieces = {i: piece for piece, i in fast.get_vocab(with_added_tokens=False).items()}
    kinds = set(_types(json.loads(fast.to_str())["decoder"]))
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        spelled = {
            i: bytes(alphabet[c] for c in piece) for i, piece in pieces.items() if i not in left_out
        }
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        spelled = {i: _piece_bytes(piece) for i, piece in pieces.items() if i not in left_out}
    else:
        raise ValueError(
            f"the bytes of this tokenizer's tokens are not known (its decoder is {sorted(kinds) or None}); byte-level "
            "BPE and SentencePiece tokenizers are understood"
        )
    return {i: raw for i, raw in spelled.items() if raw}


def _types(part: Any) -> Iterable[str]:
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.get("decoders", ()):
            yield from _types(inner)


def _piece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {
        **{chr(byte): byte for byte in shown},
        **{chr(256 + i): byte for i, byte in enumerate(hidden)},
    }


def _lead(tokenizer: Any, table: dict[int, bytes]) -> bytes:
    """What a tokenizer puts before every text: nothing or a space."""
    ids = tokenizer("a", add_special_tokens=False).input_ids
    return b" " if b"".join(table.get(i, b"") for i in ids) == b" a" else b""
