"""A fast tokenizer as the metadata of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LOW = -1000.0  # score of a token that no merge makes

# Names that llama.cpp gives to the ways of cutting text before a byte-level BPE, by a piece of their expressions.
_SPLITS = {
    "llama-bpe": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    "qwen2": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
}


def write_tokenizer(writer: Any, tokenizer: Any, vocab: int) -> None:
    """The tokens, merges, special tokens and chat template of a tokenizer, for a model of `vocab` tokens.

    Raises:
        ValueError: it is no fast BPE tokenizer, or cuts text in a way that the file has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if found["model"].get("type") != "BPE":
        raise ValueError(
            f"format='gguf' writes fast BPE tokenizers, got {type(tokenizer).__name__}; give the tokenizer as "
            "AutoTokenizer loads it"
        )
    sentences = bool(found["model"].get("byte_fallback"))
    tokens = _tokens(tokenizer, vocab)
    types = _types(tokenizer, tokens, sentences)
    writer.add_tokenizer_model("llama" if sentences else "gpt2")
    writer.add_tokenizer_pre("default" if sentences else _pre_tokenizer(found["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentences:
        # the tokens of a sentencepiece vocabulary are in the order of their merges
        writer.add_token_scores([float(-i) if t == _NORMAL else _LOW for i, t in enumerate(types)])
    else:
        pairs = found["model"]["merges"]
        writer.add_token_merges([p if isinstance(p, str) else " ".join(p) for p in pairs])
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    plain = tokenizer("a", add_special_tokens=False).input_ids
    writer.add_add_space_prefix(tokenizer.convert_ids_to_tokens(plain)[0].startswith("▁"))
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _tokens(tokenizer: Any, vocab: int) -> list[str]:
    """One for each row of the model; rows without a token get one that no text has."""
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    return [known.get(i, f"[PAD{i}]") for i in range(vocab)]


def _types(tokenizer: Any, tokens: list[str], sentences: bool) -> list[int]:
    known = set(tokenizer.get_vocab())
    types = [_NORMAL if token in known else _UNUSED for token in tokens]
    if sentences:
        for i, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[i] = _BYTE
    for number, added in tokenizer.added_tokens_decoder.items():
        if number < len(types):
            types[number] = _CONTROL if added.special else _USER_DEFINED
    if sentences and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = _UNKNOWN
    return types


def _pre_tokenizer(found: Any) -> str:
    """llama.cpp's name of how text is cut before the merges.

    Raises:
        ValueError: it has none.
    """
    steps = (found or {}).get("pretokenizers") or [found or {}]
    kinds = [step.get("type") for step in steps]
    if steps[-1].get("type") == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            expression = str(steps[0].get("pattern", {}).get("Regex"))
            for name, piece in _SPLITS.items():
                if piece in expression:
                    return name
    raise ValueError(
        f"format='gguf' has no name for how this tokenizer cuts text ({' + '.join(map(str, kinds))}); it knows those "
        "of GPT-2, SmolLM, Llama 3, Qwen 2 and sentencepiece"
    )
