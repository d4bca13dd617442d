"""Text to ids and back: the vocabulary of `tekken.json` (Mistral's format) or of `tokenizer.json` (the format of the
`tokenizers` library).

Tekken is byte-level BPE. A regular expression cuts the text into pieces, and each piece becomes bytes. Then the
adjacent pair whose concatenation has the lowest rank is merged, until no pair is in the vocabulary. Ids below
`default_num_special_tokens` are special tokens. The id of a vocabulary entry is its rank plus that number. Text is
encoded as plain text: what looks like a special token in it does not become one, unless the caller asks for that.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer as Backend, decoders, models, pre_tokenizers

from checkpoint import read_json, replace_file
from checks import brief, is_number

from .objects import check_text

TEKKEN, TOKENIZER = "tekken.json", "tokenizer.json"
# Tekken's expression: words with the blank before them, single digits, punctuation with the newlines after it,
# newlines, blanks.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-4's expression, as the library's JSON writes it. Many converted tokenizer.json files have it instead of Tekken's.
# It cuts "'The" after "'T", and numbers into groups of three digits.
WRONG_SPLIT = re.escape("\"(?i:'s|'t|'re|'ve|'m|'ll|'d)|") + r'[^"]*' + re.escape(r"\\p{N}{1,3}") + r'[^"]*"'

# The special tokens of vocabularies that do not list their own (versions up to v7).
SPECIAL_TOKENS: Sequence[str] = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
# Special tokens that only newer layouts have, the newest first.
SIGNS_OF_VERSIONS = {"v13": "[THINK]", "v11": "[ARGS]", "v7": "[SYSTEM_PROMPT]"}
NEWER_TOKENS = ("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]")
CONTROL_TOKEN = re.compile("|".join([*map(re.escape, (*SPECIAL_TOKENS, *NEWER_TOKENS)), r"<SPECIAL_\d+>"]))

CACHED_FROM = 2**20  # bytes; a smaller tekken.json is built quickly
CACHE_FORMAT = 2
MOST_IDS = 2**22  # 32 times the published vocabularies


def _byte_alphabet() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: the character itself where it is printable
    Latin-1, otherwise the next unused one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


LETTERS = _byte_alphabet()
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class TextTokenizer:
    """Encodes text into ids and decodes ids.

    Attributes:
        vocab_size: number of ids.
        special_tokens: name -> id of the special tokens, for example {"<s>": 1, "</s>": 2}.
        bos_token_id, eos_token_id, pad_token_id: ids of "<s>", "</s>" and "<pad>", or None where there is none.
        version: name of the layout of conversations.
    """

    def __init__(self, backend: Backend, version: str | None = None) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            decoder = type(backend.decoder).__name__
            allowed = "ByteLevel, as Mistral's byte-level BPE has"
            cure = "the models also take ids of transformers.AutoTokenizer"
            raise ValueError(f"the tokenizer's decoder is {decoder}; allowed: {allowed}; {cure}")
        self.backend = backend
        _make_control_tokens_special(backend)

        self._added_tokens = dict(sorted(backend.get_added_tokens_decoder().items()))
        learned = backend.get_vocab_size(with_added_tokens=False)
        self.vocab_size: int = max(learned, *(i + 1 for i in self._added_tokens), 0)
        self.special_tokens = {token.content: i for i, token in self._added_tokens.items() if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special_names = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.bos_token_id = self.special_tokens.get("<s>")
        self.eos_token_id = self.special_tokens.get("</s>")
        self.pad_token_id = self.special_tokens.get("<pad>")
        if not version:
            version = newest_version(self.special_tokens)
        self.version = version

        backend.encode_special_tokens = True  # "</s>" typed by a user stays four characters
        backend.no_truncation()  # a file can ask for these two, which would change prompts silently
        backend.no_padding()

    def encode(self, text: str, bos: bool = True, split_special_tokens: bool = True) -> list[int]:
        """Ids of a text, after the id of "<s>" (which the models expect at the start) unless `bos` is False.

        Halves of surrogate pairs, which JSON can contain, are joined or become U+FFFD.

        Args:
            split_special_tokens: read "</s>" in the text as four characters. With False it becomes the special token.
                Use False only for text that no user can write.

        Raises:
            ValueError: not a text, or one that the library cannot split.
        """
        ids = []
        if bos and self.bos_token_id is not None:
            ids.append(self.bos_token_id)
        text = check_text(text, "text").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        pieces = [text]
        if not split_special_tokens and self.special_tokens:
            pieces = self._special_names.split(text)  # every second piece is the name of a special token
        for place, piece in enumerate(pieces):
            if place % 2 == 1:
                ids.append(self.special_tokens[piece])
            else:
                ids += self._encode_plain(piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of a text without special tokens, whatever the vocabulary and the split expression are."""
        ids: list[int] = backend_call(self.backend.encode, text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return ids
        # A whole piece of the text is the name of a special token, which the vocabulary has as an entry. (Tekken's
        # expression cuts such names in two.) Single characters are not.
        ids = [i for character in text for i in self.backend.encode(character, add_special_tokens=False).ids]
        if not self._special_ids.isdisjoint(ids):
            raise ValueError(f"the tokenizer makes special tokens of {brief(text)}; it needs another vocabulary")
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD."""
        content = b"".join(self.id_to_bytes(i, skip_special_tokens) for i in ids)
        return content.decode("utf-8", errors="replace")

    def id_to_bytes(self, i: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes of one id, which need not be whole characters.

        Raises:
            ValueError: no such id.
        """
        if not isinstance(i, Integral):
            raise ValueError(f"an id is {brief(i)}; allowed: a whole number from 0 to {self.vocab_size - 1}")
        token = None
        if 0 <= i < self.vocab_size:
            token = self.backend.id_to_token(i)
        if token is None:
            raise ValueError(f"id {i} is not in the vocabulary; allowed: 0 to {self.vocab_size - 1}")
        if i in self._added_tokens:
            if self._added_tokens[i].special and skip_special_tokens:
                return b""
            return token.encode()
        if BYTES.keys() >= set(token):
            return bytes(BYTES[letter] for letter in token)
        return token.encode()

    def any_to_bytes(self, i: int, skip_special_tokens: bool = True) -> bytes:
        """The same for any id of a model, which may have more ids than the tokenizer: those become a byte that is no
        UTF-8."""
        try:
            return self.id_to_bytes(i, skip_special_tokens)
        except ValueError:
            return b"\xff"


def _make_control_tokens_special(backend: Backend) -> None:
    """Make control tokens special that a file adds as ordinary ones. Otherwise they would be found in users' text.

    Control tokens are those of Mistral's names, and all added tokens of the unbroken run of ids that begins with 0."""
    added = backend.get_added_tokens_decoder()
    first = next(i for i in range(len(added) + 1) if i not in added)  # the first id after the run
    names = []
    for i, token in added.items():
        if not token.special and (i < first or CONTROL_TOKEN.fullmatch(token.content)):
            names.append(token.content)
    _add_special_tokens(backend, names)


def backend_call(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a function of the `tokenizers` library. What it raises becomes a ValueError: bare Exception, or the
    PanicException of Rust, which is no Exception."""
    try:
        return function(*arguments, **keywords)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"the tokenizers library refuses it: {' '.join(str(error).split())[:200]}") from error


def _add_special_tokens(backend: Backend, names: list[str]) -> None:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def newest_version(special_tokens: Iterable[str]) -> str:
    """The newest layout of conversations that the special tokens allow.

    Vocabularies of V3 that were converted with the names of V7 look like V7. Give `version` for them.
    """
    names = set(special_tokens)
    for version, name in SIGNS_OF_VERSIONS.items():
        if name in names:
            return version
    return "v3"


class TextStream:
    """Decodes ids one at a time: `push` returns the characters that are complete, `close` the rest."""

    def __init__(self, tokenizer: TextTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: int) -> str:
        return self._decoder.decode(self._tokenizer.any_to_bytes(i, self._skip_special_tokens))

    def close(self) -> str:
        return self._decoder.decode(b"", final=True)


class StopText:
    """Watches a text that grows by one id at a time: `push` returns whether the id completes one of the stop texts,
    which may begin in the ids before the first `push`.

    The text is the one that `decode` returns, so a special token adds nothing to it. Transformers differs in this
    case: it compares the names of special tokens, too, and "T" ends a row at [TOOL_CALLS].
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str], ids: Sequence[int] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = stops
        self._overlap = max(map(len, stops)) - 1  # characters that an unfinished stop text can have
        self._end = ""
        for i in ids[-4 * (self._overlap + 1) :]:  # a character is 4 ids at most
            self.push(i)

    def push(self, i: int) -> bool:
        text = self._end + self._stream.push(i)
        old = len(self._end)
        self._end = text[max(0, len(text) - self._overlap) :]
        return any(text.find(stop, max(0, old - len(stop) + 1)) >= 0 for stop in self._stops)


def read_tokenizer_json(path: Path) -> Backend:
    """The tokenizer in a tokenizer.json (raises ValueError if it holds none)."""
    try:
        return backend_call(Backend.from_file, str(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def repair_split(backend: Backend) -> bool:
    """Replace GPT-4's expression by Tekken's in all pre-tokenizers. Returns False if there is none to replace."""
    if backend.pre_tokenizer is None:
        return False
    state = backend.pre_tokenizer.__getstate__().decode()
    state, replaced = re.subn(WRONG_SPLIT, lambda _: json.dumps(SPLIT), state)
    if replaced:
        repaired = pre_tokenizers.Sequence([])
        repaired.__setstate__(state.encode())
        backend.pre_tokenizer = repaired
    return replaced > 0


def read_tekken(path: Path) -> tuple[Backend, str]:
    """The tokenizer and the version of a tekken.json.

    Building the merges takes most of the time. They are stored in the user's cache folder, under the hash of the file.
    A stored file is used if it is whole. If it cannot be written, the merges are built again the next time.
    """
    content = path.read_bytes()
    cache = None
    if len(content) >= CACHED_FROM:
        cache = _cache_file(content)
    if cache is not None:
        # There may be no file, a damaged one, or one that this version of the library cannot read.
        with suppress(Exception):
            return _read_cache(cache)

    tekken = read_json(path)
    backend = from_tekken(tekken, str(path))
    version = str(tekken["config"].get("version", "missing"))
    if cache is not None:
        _write_cache(cache, backend, version)
    return backend, version


def _cache_file(content: bytes) -> Path | None:
    """The file that stores the tokenizer built from `content`; None where the user has no folder for such files."""
    folder = os.path.expanduser(cache_folder())
    if not os.path.isabs(folder):
        return None
    key = hashlib.sha256(f"{CACHE_FORMAT} {tokenizers.__version__} ".encode() + content).hexdigest()
    return Path(folder, "ministral", f"tekken-{key}.json")


def cache_folder() -> str:
    """The folder for files that programs can make again; it may begin with ~."""
    folder = os.environ.get("XDG_CACHE_HOME")
    if not folder and sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA")
    if folder:
        return folder
    defaults = {"win32": "~/AppData/Local", "darwin": "~/Library/Caches"}
    return defaults.get(sys.platform, "~/.cache")


def _read_cache(cache: Path) -> tuple[Backend, str]:
    """The stored tokenizer and its version: a line with the hash of the rest, a line with the version, and JSON."""
    digest, _, rest = cache.read_bytes().partition(b"\n")
    if digest.decode() != hashlib.sha256(rest).hexdigest():
        raise ValueError(f"{cache} is damaged")
    version, _, body = rest.partition(b"\n")
    return Backend.from_buffer(body), version.decode()


def _write_cache(cache: Path, backend: Backend, version: str) -> None:
    rest = f"{version}\n{backend.to_str()}".encode()
    digest = hashlib.sha256(rest).hexdigest()
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cache, lambda temporary: temporary.write_bytes(digest.encode() + b"\n" + rest))


def from_tekken(tekken: Any, source: str = TEKKEN) -> Backend:
    """The content of a tekken.json as a `tokenizers` tokenizer.

    Raises:
        ValueError: keys are missing or the vocabulary is not made of bytes.
    """
    try:
        names, words, split = _read_vocabulary(tekken)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{source} is not a Tekken vocabulary: {problem}") from error
    vocab = {token: i for i, token in enumerate(names + words)}
    # With ignore_merges, a whole piece is looked up in the vocabulary first.
    backend = Backend(models.BPE(vocab=vocab, merges=_merges(words), ignore_merges=True))
    cut = pre_tokenizers.Split(split, behavior="isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, to_letters])
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, names)
    return backend


def _read_vocabulary(tekken: Any) -> tuple[list[str], list[str], Regex]:
    """The names of the special tokens, the other tokens in the byte alphabet, and the split expression."""
    config = tekken["config"]
    specials = config["default_num_special_tokens"]
    size = config["default_vocab_size"]
    for key, value in (("default_num_special_tokens", specials), ("default_vocab_size", size)):
        if not is_number(value, int, 0, MOST_IDS):
            raise ValueError(f"{key}={brief(value)}; allowed: a whole number from 0 to {MOST_IDS}")
    entries = tekken["vocab"][: size - specials]
    contents = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
    names = special_token_names(tekken)
    if len(set(contents)) != size - specials or {len(content) for content in contents[:256]} != {1}:
        raise ValueError("the vocabulary must be distinct, single bytes first, and as long as config says")
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"a special token is named {brief(name)}; allowed: text of printable characters")
    if len(set(names)) != specials:
        raise ValueError("the special tokens must have different names")
    words = [content.decode("latin-1").translate(LETTERS) for content in contents]
    both = sorted(set(names) & set(words))
    if both:
        raise ValueError(f"{both[0]!r} is the name of a special token and an entry of the vocabulary")
    return names, words, backend_call(Regex, config["pattern"])


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges, which tekken.json does not list: every way to cut a token into two others, in the order of the
    token's rank. Tekken merges the pair of lowest rank first."""
    rank = {word: i for i, word in enumerate(words)}
    merges = []
    for word in words:
        cuts = []
        for i in range(1, len(word)):
            left = word[:i]
            right = word[i:]
            if left in rank and right in rank:
                cuts.append((rank[left], rank[right], left, right))
        merges += [(left, right) for _, _, left, right in sorted(cuts)]
    return merges


def special_token_names(tekken: Any) -> list[str]:
    """The names of the ids below `default_num_special_tokens`; those without a name are <SPECIAL_i>."""
    count = tekken["config"]["default_num_special_tokens"]
    listed = tekken.get("special_tokens")
    if listed is None:
        named = dict(enumerate(SPECIAL_TOKENS))
    else:
        named = {token["rank"]: token["token_str"] for token in listed}
    return [named.get(i, f"<SPECIAL_{i}>") for i in range(count)]
