"""Text <-> ids, from `tekken.json` (Mistral's format) or `tokenizer.json` (the `tokenizers` library's). Knows no model.

Tekken is byte-level BPE: a regular expression cuts the text into pieces, each piece becomes bytes, and the adjacent
pair whose concatenation has the lowest rank is merged until no pair is in the vocabulary. Ids below
`default_num_special_tokens` are special tokens; a vocabulary entry's id is its rank plus that number. The text is
always encoded as plain text: what looks like a special token in it does not become one.
"""

from __future__ import annotations

import base64
import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer as Backend, decoders, models, pre_tokenizers

from checkpoint import read_json

TEKKEN, TOKENIZER = "tekken.json", "tokenizer.json"


def _byte_alphabet() -> dict[int, str]:
    """The printable letter by which byte-level vocabularies write each byte: itself where it is printable Latin-1,
    else the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


LETTERS = _byte_alphabet()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class Tokenizer:
    """Encodes text into ids and decodes ids into text.

    Attributes:
        vocab_size: number of ids.
        special_tokens: name -> id of the special tokens, for example {"<s>": 1, "</s>": 2}.
        bos_token_id, eos_token_id, pad_token_id: ids of "<s>", "</s>" and "<pad>", or None where there is none.
    """

    def __init__(self, backend: Backend) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            found = type(backend.decoder).__name__
            raise ValueError(f"the tokenizer's decoder is {found}; allowed: ByteLevel, as Mistral's byte-level BPE has")
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._added = dict(sorted(backend.get_added_tokens_decoder().items()))
        self.special_tokens = {token.content: i for i, token in self._added.items() if token.special}
        self.bos_token_id = self.special_tokens.get("<s>")
        self.eos_token_id = self.special_tokens.get("</s>")
        self.pad_token_id = self.special_tokens.get("<pad>")
        backend.encode_special_tokens = True  # "</s>" typed by a user stays four characters
        backend.no_truncation()  # a file can ask for these two, which would change prompts silently
        backend.no_padding()

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer of a model directory; tekken.json is preferred, as Mistral's own tools do.

        Raises:
            FileNotFoundError: the directory holds neither file.
            ValueError: the file is not a tokenizer.
        """
        directory = Path(directory)
        if (directory / TEKKEN).is_file():
            return cls(from_tekken(read_json(directory / TEKKEN), str(directory / TEKKEN)))
        if not (directory / TOKENIZER).is_file():
            raise FileNotFoundError(f"{directory} holds neither {TEKKEN} nor {TOKENIZER}")
        try:
            backend = Backend.from_file(str(directory / TOKENIZER))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{directory / TOKENIZER} is not a tokenizer: {error}") from error
        return cls(backend)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, after the id of "<s>" (which the models expect at the start) unless `bos` is False."""
        start = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        return start + self.backend.encode(text, add_special_tokens=False).ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], encode_image: Callable[[Any], list[int]] | None = None
    ) -> list[int]:
        """The ids of a conversation in the layout of Ministral 3 (Mistral's version 13), up to where the answer begins:

            <s>[SYSTEM_PROMPT]system[/SYSTEM_PROMPT][INST]user[/INST]assistant</s>[INST]user[/INST]

        Ids are joined, never text: what a user types stays text. As in mistral-common, consecutive messages of a user
        (of the assistant) are one, their texts and those of neighbouring parts joined by an empty line; a picture that
        follows one text is put before it; blanks at the end of the assistant's words are dropped.

        Args:
            messages: {"role": "system", "user" or "assistant", "content": text or list of parts}. A part is
                {"type": "text", "text": text}, {"type": "image", "image": source}, or {"type": "image_url",
                "image_url": source or {"url": source}}.
            encode_image: gives the ids that stand for a source (see `generate.encode_messages`). Pictures are for users
                only.

        Raises:
            ValueError: an unknown role or part, a picture in the wrong place, an empty assistant message, a last
                message that is not the user's, or a tokenizer without these special tokens.
        """
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("the last message must be the user's; the answer follows it")
        ids = self.encode("")
        for role, group in groupby(messages, key=lambda message: message.get("role")):
            if role == "system":
                for message in group:
                    ids += self._special("[SYSTEM_PROMPT]") + self._content([message], None)
                    ids += self._special("[/SYSTEM_PROMPT]")
            elif role == "user":
                ids += self._special("[INST]") + self._content(group, encode_image) + self._special("[/INST]")
            elif role == "assistant":
                answer = self._content(group, None, blanks=False)
                if not answer:
                    raise ValueError("an assistant message is empty; leave it out, or give its words")
                ids += answer + self._special("</s>")
            else:
                raise ValueError(f"role {role!r} is impossible; allowed: system, user, assistant")
        return ids

    def _special(self, name: str) -> list[int]:
        if name not in self.special_tokens:
            raise ValueError(f"the tokenizer has no special token {name}, which this chat format needs")
        return [self.special_tokens[name]]

    def _content(
        self, messages: Iterable[Mapping[str, Any]], encode_image: Callable[[Any], list[int]] | None,
        blanks: bool = True,
    ) -> list[int]:  # fmt: skip
        """The ids of the parts of one or several messages, texts joined."""
        parts: list[tuple[str, Any]] = []
        for message in messages:
            content = message.get("content")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    if part["text"] and parts and parts[-1][0] == "text":
                        parts[-1] = ("text", parts[-1][1] + "\n\n" + part["text"])
                    elif part["text"]:
                        parts.append(("text", part["text"]))
                elif kind in ("image", "image_url") and part.get(kind):
                    source: Any = part[kind]
                    parts.append(("image", source.get("url") if isinstance(source, Mapping) else source))
                else:
                    raise ValueError(f"a part {str(part)[:60]!r} is impossible; allowed: type text, image or image_url")
        if [kind for kind, _ in parts] == ["text", "image"]:
            parts.reverse()
        ids: list[int] = []
        for kind, value in parts:
            if kind == "text":
                ids += self.encode(value if blanks else value.rstrip(" "), bos=False)
            elif encode_image is None:
                raise ValueError("a picture can only be in a user's message, for a model with eyes")
            else:
                ids += encode_image(value)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.id_to_bytes(i, skip_special_tokens) for i in ids).decode("utf-8", errors="replace")

    def id_to_bytes(self, i: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes of one id, which need not be whole characters.

        Raises:
            ValueError: no such id.
        """
        token = self.backend.id_to_token(i)
        if token is None:
            raise ValueError(f"id {i} is not in the vocabulary; allowed: 0 to {self.vocab_size - 1}")
        if i in self._added:
            return b"" if self._added[i].special and skip_special_tokens else token.encode()
        return bytes(BYTES[letter] for letter in token)


class TextStream:
    """Decodes ids one at a time: `push` returns the characters that are complete, `close` what is left."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: int) -> str:
        if i >= self._tokenizer.vocab_size:  # a model may have more ids than its tokenizer
            return self._decoder.decode(b"\xff")
        return self._decoder.decode(self._tokenizer.id_to_bytes(i))

    def close(self) -> str:
        return self._decoder.decode(b"", final=True)


def from_tekken(tekken: Any, source: str = TEKKEN) -> Backend:
    """The content of a tekken.json as a `tokenizers` tokenizer.

    The merges are not in the file: they are every way of cutting a token into two others, in the order of the
    token's rank, since merging the pair of lowest rank first is what Tekken does.

    Raises:
        ValueError: keys are missing or the vocabulary is not made of bytes.
    """
    try:
        config = tekken["config"]
        specials, size = config["default_num_special_tokens"], config["default_vocab_size"]
        words = [base64.b64decode(entry["token_bytes"], validate=True) for entry in tekken["vocab"][: size - specials]]
        names = special_token_names(tekken)
        if len(set(words)) != size - specials or {len(word) for word in words[:256]} != {1}:
            raise ValueError("the vocabulary must be distinct, single bytes first, and as long as config says")
        split = Regex(config["pattern"])
    except Exception as error:  # the library raises bare Exception for a bad expression
        raise ValueError(f"{source} is not a Tekken vocabulary: {type(error).__name__}: {error}") from error

    letters = ["".join(LETTERS[byte] for byte in word) for word in words]
    vocab = {name: i for i, name in enumerate(names)} | {word: specials + i for i, word in enumerate(letters)}
    rank = {word: i for i, word in enumerate(letters)}
    merges = []
    for word in letters:
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        found = [(rank[a], rank[b], a, b) for a, b in cuts if a in rank and b in rank]
        merges += [(a, b) for _, _, a, b in sorted(found)]

    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))  # a whole piece is looked up first
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return backend


# The special tokens of vocabularies that do not list their own (versions up to v7).
SPECIAL_TOKENS: Sequence[str] = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def special_token_names(tekken: Any) -> list[str]:
    """The names of the ids below `default_num_special_tokens`; those without a name are <SPECIAL_i>."""
    count = tekken["config"]["default_num_special_tokens"]
    listed = tekken.get("special_tokens")
    named = dict(enumerate(SPECIAL_TOKENS)) if listed is None else {t["rank"]: t["token_str"] for t in listed}
    return [named.get(i, f"<SPECIAL_{i}>") for i in range(count)]
