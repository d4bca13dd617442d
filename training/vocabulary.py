"""Learn a Tekken vocabulary: byte-level BPE cut by Mistral's regular expression, with Mistral's special tokens."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer as Backend, models, pre_tokenizers, trainers

from tokenizer import BYTES, LETTERS, SPECIAL_TOKENS, SPLIT
from tokenizer.bpe import NEWER_TOKENS

FIRST_NEWER_TOKEN = 32  # the id of NEWER_TOKENS[0] in the published files
SPECIALS = FIRST_NEWER_TOKEN + len(NEWER_TOKENS)  # ids below this one are special tokens


def learn(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """The tekken.json of a V13 vocabulary: the special tokens, the 256 bytes, then merges, most frequent first."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - SPECIALS, initial_alphabet=list(LETTERS.values()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    merges = sorted((i, token) for token, i in backend.get_vocab().items() if len(token) > 1)
    words = [bytes([byte]) for byte in range(256)]
    words += [bytes(BYTES[letter] for letter in token) for _, token in merges]
    named = dict(enumerate(SPECIAL_TOKENS)) | dict(enumerate(NEWER_TOKENS, FIRST_NEWER_TOKEN))
    return {
        "config": {
            "pattern": SPLIT,
            "num_vocab_tokens": len(words),
            "default_vocab_size": SPECIALS + len(words),
            "default_num_special_tokens": SPECIALS,
            "version": "v13",
        },
        "special_tokens": [
            {"rank": rank, "token_str": named.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
            for rank in range(SPECIALS)
        ],
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": decoded(word)}
            for rank, word in enumerate(words)
        ],
    }


def as_v3(tekken: dict[str, Any]) -> dict[str, Any]:
    """The same vocabulary in the form of Ministral-8B-Instruct-2410, whose special tokens have no list."""
    content = {name: value for name, value in tekken.items() if name != "special_tokens"}
    return content | {"config": tekken["config"] | {"version": "v3"}}


def decoded(word: bytes) -> str | None:
    """The text of a token, or None for bytes that are not a whole character."""
    try:
        return word.decode()
    except UnicodeDecodeError:
        return None
