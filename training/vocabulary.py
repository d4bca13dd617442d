"""Learn a Tekken vocabulary: byte-level BPE cut by Mistral's regular expression, with Mistral's special tokens."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer as Backend, models, pre_tokenizers, trainers

from tokenizer import BYTES, LETTERS, SPECIAL_TOKENS, SPLIT


def learn(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """A tekken.json of `vocab_size` ids: the special tokens, the 256 bytes, then merges, most frequent first."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    specials = len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - specials, initial_alphabet=list(LETTERS.values()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    merges = sorted((i, token) for token, i in backend.get_vocab().items() if len(token) > 1)
    words = [bytes([byte]) for byte in range(256)]
    words += [bytes(BYTES[letter] for letter in token) for _, token in merges]
    return {
        "config": {
            "pattern": SPLIT,
            "num_vocab_tokens": len(words),
            "default_vocab_size": specials + len(words),
            "default_num_special_tokens": specials,
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": decoded(word)}
            for rank, word in enumerate(words)
        ],
    }


def decoded(word: bytes) -> str | None:
    """The text of a token, or None for bytes that are not a whole character."""
    try:
        return word.decode()
    except UnicodeDecodeError:
        return None
