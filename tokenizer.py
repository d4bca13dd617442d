"""Text <-> ids and conversations <-> ids, from `tekken.json` (Mistral's format) or `tokenizer.json` (the `tokenizers`
library's). Knows no model.

Tekken is byte-level BPE: a regular expression cuts the text into pieces, each piece becomes bytes, and the adjacent
pair whose concatenation has the lowest rank is merged until no pair is in the vocabulary. Ids below
`default_num_special_tokens` are special tokens; a vocabulary entry's id is its rank plus that number. The text is
always encoded as plain text: what looks like a special token in it does not become one.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, count, groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer as Backend, decoders, models, pre_tokenizers

from checkpoint import read_json, replace_file

TEKKEN, TOKENIZER = "tekken.json", "tokenizer.json"
# Tekken's expression: words with the blank before them, single digits, punctuation with the newlines after it,
# newlines, blanks. And, in the library's JSON, the one that many a converted tokenizer.json has in its place: GPT-4's,
# which cuts "'The" after "'T" and numbers into groups of three digits.
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WRONG_SPLIT = re.escape("\"(?i:'s|'t|'re|'ve|'m|'ll|'d)|") + r'[^"]*' + re.escape(r"\\p{N}{1,3}") + r'[^"]*"'


def _byte_alphabet() -> dict[int, str]:
    """The printable letter by which byte-level vocabularies write each byte: itself where it is printable Latin-1,
    else the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


LETTERS = _byte_alphabet()
BYTES = {letter: byte for byte, letter in LETTERS.items()}

# How conversations are laid out. Names in brackets, <s> and </s> are special tokens, one id each; there are no blanks
# between the parts, and "..." is where an answer begins. V3 is Ministral-8B-Instruct-2410, V13 is Ministral 3.
#
#   V3   <s>[INST]user[/INST]assistant</s>[AVAILABLE_TOOLS][{tool}, ...][/AVAILABLE_TOOLS][INST]system\n\nuser[/INST]...
#        [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]</s>
#        [TOOL_RESULTS]{"content": 2, "call_id": "123456789"}[/TOOL_RESULTS]...
#   V7   <s>[SYSTEM_PROMPT]system[/SYSTEM_PROMPT][INST]user[/INST]assistant</s>[AVAILABLE_TOOLS]...[INST]user[/INST]...
#        calls as in V3, also after words; [TOOL_RESULTS]123456789[TOOL_CONTENT]2[/TOOL_RESULTS]...
#   V11  as V7, but [TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]...</s>; results in the calls' order
#   V13  <s>[SYSTEM_PROMPT]system[/SYSTEM_PROMPT][AVAILABLE_TOOLS]...[INST]user[/INST]assistant</s>[INST]user[/INST]...
#        [THINK]thinking[/THINK]words[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]...</s>, thinking also in system prompts
#        [TOOL_RESULTS]2[/TOOL_RESULTS]...; results in the calls' order
#
# The tools stand before the last user's turn, in V13 before the first; V3's system prompts all go into the last one.
VERSIONS = ("v3", "v7", "v11", "v13")
ROLES = ("system", "user", "assistant", "tool")
SWITCHES = {"[THINK]": "thinking", "[/THINK]": "text", "[TOOL_CALLS]": "call"}  # what an answer goes on with

# The keys that are read of each object of a conversation; any other is refused by name. Some are checked and
# change no id: the "name" of a result, the "index" of a call, the "detail" of an image, and the "error" of a
# malformed call.
KEYS = {
    "a message of role system": ("role", "content"),
    "a message of role user": ("role", "content"),
    "a message of role assistant": (
        *("role", "content", "reasoning_content", "reasoning", "tool_calls", "malformed_calls", "prefix"),
    ),
    "a message of role tool": ("role", "content", "tool_call_id", "name"),
    "a part of type text": ("type", "text"),
    "a part of type image": ("type", "image", "url", "path", "base64"),
    "a part of type image_url": ("type", "image_url"),
    "a part of type thinking": ("type", "thinking", "closed"),
    "an image_url": ("url", "detail"),
    "a tool": ("type", "function"),
    "a tool's function": ("name", "description", "parameters", "strict"),  # mistral-common ignores strict, too
    "a tool call": ("id", "type", "function", "index"),
    "a tool call's function": ("name", "arguments"),
    "a malformed call": ("text", "error"),
    "a tool call that the model wrote": ("name", "arguments", "id", "type"),
}
# Clients send fields that say nothing: these keys may be in any of the objects if they are empty. The first
# ones are OpenAI's, which no layout has a place for.
MAY_BE_EMPTY = {
    *("name", "refusal", "annotations", "audio", "function_call", "parsed", "parsed_arguments", "strict"),
    *chain.from_iterable(KEYS.values()),
}
IMAGE_SOURCES = ("image", "url", "path", "base64")

# Signs of other layouts in chat templates, and tokens that only other layouts have.
OTHER_MARKERS = re.compile(r"<\|[^|<>\s]{1,40}\|>|<start_of_turn>")
OTHER_TOKENS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>")


class _Message(NamedTuple):
    """What the layouts need of a message, checked."""

    role: str
    # ("text", text), ("malformed", text), ("image", source) or ("thinking", (text, closed))
    parts: list[tuple[str, Any]]
    calls: Sequence[dict[str, Any]] = ()  # {"name", "arguments", "id"}, the id only if there is one
    answers: str | None = None  # a tool's: the id of the call
    order: int = 0  # a tool's: which of the calls that is
    prefix: bool = False


class Tokenizer:
    """Encodes text and conversations into ids and decodes ids.

    Attributes:
        vocab_size: number of ids.
        special_tokens: name -> id of the special tokens, for example {"<s>": 1, "</s>": 2}.
        bos_token_id, eos_token_id, pad_token_id: ids of "<s>", "</s>" and "<pad>", or None where there is none.
        version: the layout of conversations, one of `VERSIONS`; with another one text works, `encode_chat` does not.
        other_layout: what says that the layout is not Mistral's, or "". `encode_chat` refuses, then.
    """

    def __init__(self, backend: Backend, version: str | None = None) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            found = type(backend.decoder).__name__
            raise ValueError(f"the tokenizer's decoder is {found}; allowed: ByteLevel, as Mistral's byte-level BPE has")
        self.backend = backend
        # Control tokens that a file adds as ordinary ones would be found in what users type.
        added = backend.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.content in SPECIAL_TOKENS and not token.special]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        self._added = dict(sorted(backend.get_added_tokens_decoder().items()))
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in self._added), 0)
        self.special_tokens = {token.content: i for i, token in self._added.items() if token.special}
        self.bos_token_id = self.special_tokens.get("<s>")
        self.eos_token_id = self.special_tokens.get("</s>")
        self.pad_token_id = self.special_tokens.get("<pad>")
        # The newest layout that the special tokens allow. Vocabularies of V3 that were converted with the names of V7
        # look like V7: `version` is for them.
        signs = {"v13": "[THINK]", "v11": "[ARGS]", "v7": "[SYSTEM_PROMPT]"}
        self.version = version or next((v for v, name in signs.items() if name in self.special_tokens), "v3")
        self.other_layout = ""
        backend.encode_special_tokens = True  # "</s>" typed by a user stays four characters
        backend.no_truncation()  # a file can ask for these two, which would change prompts silently
        backend.no_padding()

    @classmethod
    def from_dir(cls, directory: str | Path, version: str | None = None) -> Tokenizer:
        """Read the tokenizer of a model directory; tekken.json is preferred, as Mistral's own tools do. A large one is
        read faster the second time (see `_read_tekken`).

        Args:
            directory: holds tekken.json or tokenizer.json.
            version: the layout of conversations; by default the one that tekken.json names, or that the special tokens
                of tokenizer.json suggest ([THINK]: v13; [ARGS]: v11; [SYSTEM_PROMPT]: v7; else v3). By
                default, too, `encode_chat` refuses where the chat template or the tokens show a layout that
                is not Mistral's.

        Raises:
            FileNotFoundError: the directory holds neither file.
            ValueError: the file is not a tokenizer, or that of the chat template is not JSON.
        """
        directory = Path(directory)
        tokenizer = cls._read(directory, version)
        if version is None:
            added = {token.content for token in tokenizer._added.values()}
            tokenizer.other_layout = _other_layout(directory, added)
        return tokenizer

    @classmethod
    def _read(cls, directory: Path, version: str | None) -> Tokenizer:
        if (directory / TEKKEN).is_file():
            backend, found = _read_tekken(directory / TEKKEN)
            return cls(backend, version or found)
        if not (directory / TOKENIZER).is_file():
            raise FileNotFoundError(f"{directory} holds neither {TEKKEN} nor {TOKENIZER}")
        try:
            backend = Backend.from_file(str(directory / TOKENIZER))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{directory / TOKENIZER} is not a tokenizer: {error}") from error
        tokenizer = cls(backend, version)
        if "[INST]" in tokenizer.special_tokens and _repair_split(backend):  # others, as Llama 3, use it rightly
            message = f"{directory / TOKENIZER} splits text by GPT-4's expression; Tekken's is used"
            warnings.warn(message, stacklevel=3)
        return tokenizer

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, after the id of "<s>" (which the models expect at the start) unless `bos` is False. Halves of
        surrogate pairs, which JSON can contain, are joined or become U+FFFD."""
        start = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return start + self.backend.encode(text, add_special_tokens=False).ids

    def check_layout(self) -> None:
        """Raise ValueError if `encode_chat` does not know the layout of this tokenizer's conversations."""
        if self.version not in VERSIONS:
            allowed = ", ".join(VERSIONS)
            raise ValueError(f"the tokenizer's chat version is {self.version!r}; allowed: {allowed}")
        if self.other_layout:
            raise ValueError(
                f"{self.other_layout}: this chat layout is not supported; supported: Mistral's. Plain text"
                " works (--raw, Tokenizer.encode). Tokenizer.from_dir(directory, version) takes Mistral's"
                " layout all the same"
            )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        encode_image: Callable[[Any], list[int]] | None = None,
    ) -> list[int]:
        """The ids of a conversation, up to where the answer begins, in the layout of `version` (shown at `VERSIONS`).

        Ids are joined, never text: what a user types stays text. The ids are mistral-common's; the order of roles is
        free, though, but for the rules under Raises. As there, consecutive messages of a user (of the assistant) are
        one, and their texts and those of neighbouring parts are joined by an empty line; a picture that follows one
        text is put before it; blanks at the end of the assistant's words are dropped where there is no thinking.
        Transformers' chat templates differ in four places: they round picture sizes in another way, keep those blanks,
        add a default system prompt where there is none, and let special tokens typed by a user through. (They also keep
        the JSON of tools, calls and results as it was written, and the results' order.)

        Args:
            messages: {"role": "system", "user", "assistant" or "tool", "content": text or list of parts}. A part is
                {"type": "text", "text": text}, {"type": "thinking", "thinking": text or list of text parts,
                "closed": bool} (V13: system, assistant), or an image (users): {"type": "image", one of
                "image", "url", "path", "base64": source} or {"type": "image_url", "image_url": source or
                {"url": source}}. An assistant's message may have "reasoning_content" or "reasoning": text,
                which is thinking before the content, "tool_calls": [{"id": text, "type": "function",
                "function": {"name": text, "arguments": JSON text or object}}], and the "malformed_calls" of
                `decode_chat`, which are words after the content; the last one with "prefix": True is
                continued by the answer. A tool's has the "tool_call_id" that it answers. Every other key is
                refused, unless it is one of `MAY_BE_EMPTY` and empty (None, False, no text).
            tools: {"type": "function", "function": {"name", "description", "parameters": JSON schema}}.
            encode_image: gives the ids that stand for a source (see `generate.encode_messages`).

        Raises:
            ValueError: an unknown role, part, type or key, a part in the wrong place, an empty assistant
                message (in V3 also one with words and calls), a last message that is neither the user's nor
                a tool's nor a prefix, a result that answers no open call, a call still open when the
                assistant goes on, a call without the id that the version needs (nine letters or digits; in
                V13 any, or none: results then answer the calls in turn), tools without a user, or a
                tokenizer without the special tokens or of another layout.
        """
        self.check_layout()
        turns = self._turns(messages)
        system = ""
        if self.version == "v3":
            systems = [_joined(turn.parts) for turn in turns if turn.role == "system" and turn.parts]
            system = "\n\n".join(parts[0][1] if parts else "" for parts in systems)
            turns = [turn for turn in turns if turn.role != "system"]
            if turns[0].role != "user":
                turns.insert(0, _Message("user", []))
        users = [place for place, turn in enumerate(turns) if turn.role == "user"]
        if tools and not users:
            raise ValueError("tools are shown with a user's message, and there is none")
        ids = self.encode("")
        for place, turn in enumerate(turns):
            if turn.role == "system":
                ids += self._between("SYSTEM_PROMPT", self._parts(_joined(turn.parts)))
            elif turn.role == "user":
                if tools and place == users[0 if self.version == "v13" else -1]:
                    ids += self._between("AVAILABLE_TOOLS", self.encode(_dump(_tools(tools)), bos=False))
                parts = turn.parts[::-1] if [kind for kind, _ in turn.parts] == ["text", "image"] else turn.parts
                if system and place == users[-1]:
                    parts = [("text", system + "\n\n"), *parts]
                    if all(kind == "text" for kind, _ in parts):
                        parts = [("text", "".join(text for _, text in parts))]
                ids += self._between("INST", self._parts(parts, encode_image))
            elif turn.role == "assistant":
                if [kind for kind, _ in turn.parts] == ["text"]:
                    ids += self.encode(turn.parts[0][1].rstrip(" "), bos=False)
                else:
                    ids += self._parts(turn.parts)
                ids += self._calls(turn.calls) + ([] if turn.prefix else self._control("</s>"))
            else:
                ids += self._result(turn)
        return ids

    def _turns(self, messages: Any) -> list[_Message]:
        """Checked messages, consecutive ones of the user (the assistant) joined, results in the order of the layout."""
        if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
            raise ValueError(f"the messages are {brief(messages)}; allowed: a list of at least one message")
        read = _each("messages", messages, self._read_message)
        if read[-1].role not in ("user", "tool") and not read[-1].prefix:
            raise ValueError(
                "the last message must be the user's, a tool's, or one of the assistant with prefix: true; the answer "
                f"follows it, but it is of role {read[-1].role}"
            )
        if any(message.prefix for message in read[:-1]):
            raise ValueError("prefix: true is only for the last message, which the answer continues")
        unanswered: dict[int, Any] = {}
        for place, message in enumerate(read):
            if message.role == "assistant":
                if unanswered:
                    raise ValueError(f"tool calls {brief([*unanswered.values()])} have no result; the assistant waits")
                unanswered = {i: call.get("id") for i, call in enumerate(message.calls)}
                named = [i for i in unanswered.values() if i is not None]
                if len(set(named)) < len(named):
                    raise ValueError(f"tool calls of one message have the ids {brief(named)}; allowed: different ones")
            elif message.role == "tool":
                order = next((i for i, call in unanswered.items() if call == message.answers), None)
                if order is None:
                    allowed = f"those of open calls, {brief([*unanswered.values()])}"
                    raise ValueError(f"a result has tool_call_id {brief(message.answers)}; allowed: {allowed}")
                del unanswered[order]
                read[place] = message._replace(order=order)
        turns = []
        for role, group in groupby(read, key=lambda message: message.role):
            found = list(group)
            if role in ("user", "assistant"):
                parts = _joined(part for message in found for part in message.parts)
                calls = [call for message in found for call in message.calls]
                if role == "assistant" and not parts and not calls:
                    raise ValueError("an assistant message is empty; leave it out, or give its words")
                if self.version == "v3" and calls and any(kind != "malformed" for kind, _ in parts):
                    raise ValueError("an assistant message has words and tool calls; v3 allows one of them")
                found = [found[-1]._replace(parts=parts, calls=calls)]
            elif role == "tool" and self.version in ("v11", "v13"):
                found.sort(key=lambda message: message.order)
            turns += found
        return turns

    def _read_message(self, message: Any) -> _Message:
        if not isinstance(message, Mapping):
            raise ValueError(f"a message is {brief(message)}; allowed: an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role {brief(role)} is not supported; supported: {', '.join(ROLES)}")
        _check_keys(message, f"a message of role {role}")
        content = content_with_thinking(message)
        if content == "" or (content is None and role == "assistant"):
            content = []
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"the content of a message is {brief(content)}; allowed: text or a list of parts")
        parts = _each("content", content, _read_part)
        kinds = {kind for kind, _ in parts}
        if "image" in kinds and role != "user":
            raise ValueError(f"an image can only be in a user's message, not in one of role {role}")
        if "thinking" in kinds and (role not in ("system", "assistant") or self.version != "v13"):
            found = f"{role}, {self.version}"
            raise ValueError(f"thinking is not supported here ({found}); supported: system, assistant in v13")
        if role == "tool":
            self._check_call_id(message.get("tool_call_id"))
            if message.get("name") is not None:
                _check_name(message["name"])
            return _Message(role, parts, answers=message.get("tool_call_id"))
        if role != "assistant":
            return _Message(role, parts)
        prefix = message.get("prefix", False)
        if not isinstance(prefix, bool):
            raise ValueError(f"prefix is {brief(prefix)}; allowed: true or false")
        parts += _each("malformed_calls", _list_of(message, "malformed_calls"), _read_malformed)
        calls = _each("tool_calls", _list_of(message, "tool_calls"), self._read_call)
        return _Message(role, parts, calls, prefix=prefix)

    def _read_call(self, call: Any) -> dict[str, Any]:
        """{"name", "arguments", "id"} of a tool call; arguments that are no JSON stay text, as in mistral-common."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise ValueError(f"a tool call is {brief(call)}; allowed: type function, function: {{name, arguments}}")
        _check_keys(call, "a tool call")
        _check_keys(function, "a tool call's function")
        index = call.get("index")  # its place in a stream
        if index is not None and type(index) is not int:
            raise ValueError(f"a tool call's index is {brief(index)}; allowed: a whole number")
        arguments = function.get("arguments")
        if arguments is not None and not isinstance(arguments, (str, Mapping)):
            raise ValueError(f"a tool call's arguments are {brief(arguments)}; allowed: a JSON object, or its text")
        text = arguments if isinstance(arguments, str) else _dump(arguments or {})
        read = {"name": _check_name(function.get("name")), "arguments": _load(text)}
        self._check_call_id(call.get("id"))
        return read if call.get("id") is None else read | {"id": call["id"]}

    def _check_call_id(self, found: Any) -> None:
        if self.version == "v13":
            if found is not None and (not isinstance(found, str) or found in ("", "null")):
                raise ValueError(f"a tool call's id is {brief(found)}; allowed in v13: text but '' and 'null', or none")
        elif not isinstance(found, str) or not re.fullmatch("[a-zA-Z0-9]{9}", found):
            raise ValueError(f"a tool call's id is {brief(found)}; allowed in {self.version}: 9 letters or digits")

    def _parts(
        self, parts: Iterable[tuple[str, Any]], encode_image: Callable[[Any], list[int]] | None = None
    ) -> list[int]:
        ids: list[int] = []
        for kind, value in parts:
            if kind in ("text", "malformed"):
                ids += self.encode(value, bos=False)
            elif kind == "thinking":
                text, closed = value
                ids += self._control("[THINK]") + self.encode(text, bos=False)
                ids += self._control("[/THINK]") if closed else []
            elif encode_image is None:
                raise ValueError("an image can only be in a user's message, for a vision model")
            else:
                ids += encode_image(value)
        return ids

    def _calls(self, calls: Sequence[dict[str, Any]]) -> list[int]:
        if calls and self.version in ("v3", "v7"):
            return self._control("[TOOL_CALLS]") + self.encode(_dump(calls), bos=False)
        ids: list[int] = []
        for call in calls:
            ids += self._control("[TOOL_CALLS]") + self.encode(call["name"], bos=False)
            if self.version == "v11":
                ids += self._control("[CALL_ID]") + self.encode(call["id"], bos=False)
            ids += self._control("[ARGS]") + self.encode(_dump(call["arguments"]), bos=False)
        return ids

    def _result(self, turn: _Message) -> list[int]:
        text = "".join(text for _, text in _joined(turn.parts))  # there is one at most
        if self.version == "v3":
            text = _dump({"content": _load(text), "call_id": turn.answers})
        ids = self.encode(text, bos=False)
        if self.version in ("v7", "v11"):
            ids = self.encode(turn.answers or "", bos=False) + self._control("[TOOL_CONTENT]") + ids
        return self._between("TOOL_RESULTS", ids)

    def _between(self, name: str, ids: list[int]) -> list[int]:
        return self._control(f"[{name}]") + ids + self._control(f"[/{name}]")

    def _control(self, name: str) -> list[int]:
        if name not in self.special_tokens:
            raise ValueError(f"the tokenizer has no special token {name}, which this chat format needs")
        return [self.special_tokens[name]]

    def switches(self) -> dict[int, str]:
        """The ids after which an answer is of another kind: "thinking" (in V13), "text", or "call"."""
        kinds = SWITCHES if self.version == "v13" else {"[TOOL_CALLS]": "call"}
        return {self.special_tokens[name]: kind for name, kind in kinds.items() if name in self.special_tokens}

    def decode_chat(self, ids: Iterable[int], kind: str = "text") -> dict[str, Any]:
        """The assistant's message that generated ids are, up to "</s>", as `encode_chat` takes it: {"role":
        "assistant", "content": text, or a list of parts where there is thinking}, and where there are some:

            "tool_calls": [{"id", "type": "function", "function": {"name", "arguments": object}}], without id in V13;
            "malformed_calls": [{"text": what was written, "error": what is wrong with it}].

        The form of a call is told by its special tokens, not by the version. [TOOL_CALLS] ends thinking: a call in it
        is a call, and the thinking is not closed. [/THINK] without [THINK] ends what the prompt began.

        Calls are read as models write them: strings may hold raw line breaks, arguments may be an object in
        JSON text, one call may stand without its list. An id that the version needs and that is missing, not
        of its form or given before is replaced by a new one. What follows a call in words is kept in
        `malformed_calls`. A call that could be read in two ways, or that `encode_chat` would refuse, is kept
        there as it was written.

        Args:
            kind: what the ids begin with; "thinking" if the prompt ends within thinking.
        """
        runs = self._runs(ids, kind)
        parts: list[dict[str, Any]] = []
        calls: list[dict[str, Any]] = []
        malformed: list[dict[str, str]] = []
        for kind, run in runs:
            if kind == "call":
                try:
                    if self.version == "v3" and parts:
                        raise ValueError("a tool call after words; v3 allows one of them")
                    found, words = self._decode_calls(run, {call.get("id") for call in calls})
                    calls += found
                    if words:
                        malformed.append({"text": words, "error": "words after a tool call, no part of it"})
                except (ValueError, RecursionError) as error:
                    malformed.append({"text": "[TOOL_CALLS]" + self._written(run), "error": str(error)})
            elif kind != "text":
                if run or kind == "thought" or len(runs) > 1:
                    text = self._written(run, True)
                    parts.append({"type": "thinking", "thinking": text, "closed": kind == "thought"})
            elif text := self._written(run, True):
                parts.append({"type": "text", "text": text})
        only_text = [part["type"] for part in parts] in ([], ["text"])
        content = "".join(part["text"] for part in parts) if only_text else parts
        message = {"role": "assistant", "content": content, "tool_calls": calls, "malformed_calls": malformed}
        return {key: value for key, value in message.items() if value or key == "content"}

    def _runs(self, ids: Iterable[int], kind: str) -> list[tuple[str, list[int]]]:
        """The ids of an answer, cut where it goes on with another kind: "text", "call", "thinking" that is
        open, or "thought", which is closed."""
        switches, close = self.switches(), self.special_tokens.get("[/THINK]")
        runs: list[tuple[str, list[int]]] = [(kind, [])]
        for i in takewhile(lambda i: i != self.eos_token_id, map(int, ids)):
            if i == close and i in switches and runs[-1][0] != "call":
                runs[-1] = ("thought", runs[-1][1])
            if i in switches:
                runs.append((switches[i], []))
            else:
                runs[-1][1].append(i)
        return runs

    def _decode_calls(self, ids: list[int], taken: set[Any]) -> tuple[list[dict[str, Any]], str]:
        """The calls after one [TOOL_CALLS]: a JSON list, or name[ARGS]arguments, or
        name[CALL_ID]id[ARGS]arguments; and the words after them. `taken`: the ids of the calls before.

        Raises:
            ValueError, RecursionError: they are none, or not as `encode_chat` takes them.
        """
        written = self._written(ids)
        found: Any
        if self.special_tokens.get("[ARGS]") in ids:
            head, _, arguments = written.partition("[ARGS]")
            name, has_id, call_id = head.partition("[CALL_ID]")
            found, words = _first_json(arguments)
            found = [{"name": name.strip(), "arguments": found} | ({"id": call_id} if has_id else {})]
        else:
            found, words = _first_json(written)
            found = [found] if isinstance(found, dict) else found
        if not isinstance(found, list) or not found or not all(isinstance(call, dict) for call in found):
            raise ValueError(f"tool calls are {brief(found)}; allowed: a list of objects")
        calls = []
        for call in found:
            _check_keys(call, "a tool call that the model wrote")
            arguments = call.get("arguments")
            if isinstance(arguments, str):
                arguments = _whole_json(arguments)
            if not isinstance(arguments, dict):
                raise ValueError(f"a tool call's arguments are {brief(arguments)}; allowed: a JSON object")
            function = {"name": call.get("name"), "arguments": arguments}
            call_id = self._usable_id(call.get("id"), taken)
            taken = taken | {call_id}
            read = {"type": call.get("type", "function"), "function": function}
            calls.append(read if call_id is None else {"id": call_id} | read)
            self._read_call(calls[-1])
        return calls, words

    def _usable_id(self, found: Any, taken: set[Any]) -> Any:
        """The id that a model wrote, or a new one if the version does not take it or it is taken; None in V13
        if there is none. An id only ties a result to its call, so another one says the same."""
        with suppress(ValueError):
            self._check_call_id(found)
            if found is None or found not in taken:
                return found
        for number in count():
            digest = hashlib.sha256(f"{number} {brief(found)}".encode(errors="replace")).hexdigest()[:9]
            if digest not in taken:
                return digest

    def _written(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """As `decode`, also of ids that only the model has."""
        return b"".join(self.any_to_bytes(i, skip_special_tokens) for i in ids).decode("utf-8", errors="replace")

    def any_to_bytes(self, i: int, skip_special_tokens: bool = True) -> bytes:
        """As `id_to_bytes`; a byte that is no UTF-8 for an id that only the model has, which may have more."""
        try:
            return self.id_to_bytes(i, skip_special_tokens)
        except ValueError:
            return b"\xff"

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.id_to_bytes(i, skip_special_tokens) for i in ids).decode("utf-8", errors="replace")

    def id_to_bytes(self, i: int, skip_special_tokens: bool = True) -> bytes:
        """The bytes of one id, which need not be whole characters.

        Raises:
            ValueError: no such id.
        """
        token = self.backend.id_to_token(i) if 0 <= i < self.vocab_size else None
        if token is None:
            raise ValueError(f"id {i} is not in the vocabulary; allowed: 0 to {self.vocab_size - 1}")
        if i in self._added:
            return b"" if self._added[i].special and skip_special_tokens else token.encode()
        return bytes(BYTES[letter] for letter in token) if BYTES.keys() >= set(token) else token.encode()


class TextStream:
    """Decodes ids one at a time: `push` returns the characters that are complete, `close` what is left."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i: int) -> str:
        return self._decoder.decode(self._tokenizer.any_to_bytes(i))

    def close(self) -> str:
        return self._decoder.decode(b"", final=True)


class StopText:
    """Watches a text that grows by one id at a time: `push` returns whether the id completes one of the stop texts,
    which may begin in the ids before the first `push`.

    The text is the one that `decode` returns, so a special token adds nothing to it. Transformers differs in this
    case: it compares the names of special tokens, too, and "T" ends a row at [TOOL_CALLS].
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], ids: Sequence[int] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = stops
        self._kept = max(map(len, stops)) - 1  # characters that the beginning of a stop text may have
        self._end = ""
        for i in ids[-4 * (self._kept + 1) :]:  # a character is 4 ids at most
            self.push(i)

    def push(self, i: int) -> bool:
        text = self._end + self._stream.push(i)
        old = len(self._end)
        self._end = text[max(0, len(text) - self._kept) :]
        return any(text.find(stop, max(0, old - len(stop) + 1)) >= 0 for stop in self._stops)


class ChatStream:
    """`TextStream` for a chat's answer: `push` returns the kind ("text", "thinking" or "call") and the characters.

    A special token that begins another kind returns what was left of the one before; `decode_chat` reads the calls.
    An answer begins with words, or with another `kind`.
    """

    def __init__(self, tokenizer: Tokenizer, kind: str = "text") -> None:
        self.kind = kind
        self._stream = TextStream(tokenizer)
        self._switches = tokenizer.switches()

    def push(self, i: int) -> tuple[str, str]:
        if i not in self._switches:
            return self.kind, self._stream.push(i)
        left, self.kind = (self.kind, self._stream.close()), self._switches[i]
        return left

    def close(self) -> tuple[str, str]:
        return self.kind, self._stream.close()


def split_thinking(text: str) -> list[dict[str, Any]]:
    """The parts of a system prompt in which [THINK]...[/THINK] stands for thinking, as in SYSTEM_PROMPT.txt of the
    Reasoning models. For files that one trusts: it makes special tokens of text."""
    parts: list[dict[str, Any]] = []
    for words, begin, thinking, end in re.findall(r"(.*?)(?:(\[THINK\])(.*?)(\[/THINK\]|\Z)|\Z)", text, re.DOTALL):
        parts += [{"type": "text", "text": words}] if words else []
        parts += [{"type": "thinking", "thinking": thinking, "closed": bool(end)}] if begin else []
    return parts


def content_with_thinking(message: Mapping[str, Any]) -> Any:
    """The content of a message. What an assistant's "reasoning_content" or "reasoning" holds, as
    OpenAI-compatible servers write it, is thinking before the content, as in mistral-common."""
    content = message.get("content")
    found = [message[key] for key in ("reasoning_content", "reasoning") if message.get(key) is not None]
    if not found or message.get("role") != "assistant":
        return content
    if not all(isinstance(thinking, str) for thinking in found):
        raise ValueError(f"reasoning_content or reasoning is {brief(found)}; allowed: text")
    if found[0] != found[-1]:
        raise ValueError("reasoning_content and reasoning differ; give one of them")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple, type(None))):
        return content  # refused as such
    if any(isinstance(part, Mapping) and part.get("type") == "thinking" for part in parts or ()):
        raise ValueError("thinking is both in content and in reasoning_content or reasoning; give it once")
    return [{"type": "thinking", "thinking": found[0], "closed": True}, *(parts or ())]


def brief(value: Any) -> str:
    """The `repr` of a value, shortened and on one line."""
    return " ".join(reprlib.repr(value).split())


def _each(where: str, items: Iterable[Any], read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of each item; an error says which one it is about."""
    found = []
    for place, item in enumerate(items):
        try:
            found.append(read(item))
        except ValueError as error:
            raise ValueError(f"{where}[{place}]: {error}") from error
    return found


def _is_empty(value: Any) -> bool:
    """Whether a value of JSON says nothing."""
    if isinstance(value, (str, list, tuple, Mapping)):
        return not value
    return value is None or value is False


def _check_keys(found: Mapping[Any, Any], what: str) -> None:
    """Raise ValueError if an object has a key that is not read and says something (see `KEYS`)."""
    for key, value in found.items():
        if key in KEYS[what] or (key in MAY_BE_EMPTY and _is_empty(value)):
            continue
        supported = ", ".join(KEYS[what])
        raise ValueError(
            f"{brief(key)}: {brief(value)} is not supported in {what}; supported: {supported}. Leave it out"
        )


def _list_of(message: Mapping[str, Any], key: str) -> Sequence[Any]:
    found = message.get(key)
    if not isinstance(found, (list, tuple, type(None))):
        raise ValueError(f"{key} is {brief(found)}; allowed: a list")
    return found or ()


def _read_part(part: Any) -> tuple[str, Any]:
    """("text", text), ("image", source) or ("thinking", (text, closed)) of a part of a message."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or f"a part of type {kind}" not in KEYS:
        supported = "an object of type text, image, image_url or thinking"
        raise ValueError(f"a part is {brief(part)}; supported: {supported}")
    _check_keys(part, f"a part of type {kind}")
    if kind == "image":
        return "image", _image_source(part)
    if part.get(kind) is None:
        raise ValueError(f"a part of type {kind} has no {kind}")
    if kind == "image_url":
        return "image", _image_url(part["image_url"])
    if kind == "text":
        return "text", _text(part["text"], "text")
    thinking, closed = part["thinking"], part.get("closed", True)
    if not isinstance(closed, bool):
        raise ValueError(f"closed is {brief(closed)}; allowed: true or false")
    if isinstance(thinking, (list, tuple)):
        inner = _each("thinking", thinking, _read_part)
        if any(kind != "text" for kind, _ in inner):
            raise ValueError(f"thinking is {brief(thinking)}; allowed: text, or a list of parts of type text")
        thinking = "".join(text for _, text in inner)
    return "thinking", (_text(thinking, "thinking"), closed)


def _image_source(part: Mapping[str, Any]) -> Any:
    """The source in a part of type image, as `vision.load_image` takes it."""
    given = [key for key in IMAGE_SOURCES if not _is_empty(part.get(key))]
    if len(given) != 1:
        found = " and ".join(given) or "no source"
        allowed = ", ".join(IMAGE_SOURCES)
        raise ValueError(f"a part of type image has {found}; allowed: one of the keys {allowed}")
    key, source = given[0], part[given[0]]
    if key == "image":
        return source
    if key == "path" and isinstance(source, os.PathLike):
        source = os.fspath(source)
    source = _text(source, key)
    if key == "base64" and source[:5].lower() != "data:":
        return f"data:image;base64,{source}"
    return source


def _image_url(value: Any) -> str:
    """The source in a part of type image_url."""
    if not isinstance(value, Mapping):
        if value == "":
            raise ValueError("image_url is empty; allowed: an address, or {url: address}")
        return _text(value, "image_url")
    _check_keys(value, "an image_url")
    if _is_empty(value.get("url")):
        raise ValueError("an image_url has no url")
    detail = value.get("detail")
    if detail not in (None, "", "auto", "high"):
        raise ValueError(f"detail {brief(detail)} is not supported; supported: auto, high")
    return _text(value["url"], "url")


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {brief(value)}; allowed: text")
    return value


def _read_malformed(call: Any) -> tuple[str, str]:
    """A malformed call of `decode_chat`, which is words in the history."""
    if not isinstance(call, Mapping):
        raise ValueError(f"a malformed call is {brief(call)}; allowed: {{text, error}}")
    _check_keys(call, "a malformed call")
    return "malformed", _text(call.get("text"), "text")


def _joined(parts: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Neighbouring texts made one, with an empty line between them; empty ones left out."""
    joined: list[tuple[str, Any]] = []
    for kind, value in parts:
        if kind == "text" and value and joined and joined[-1][0] == "text":
            joined[-1] = ("text", joined[-1][1] + "\n\n" + value)
        elif kind != "text" or value:
            joined.append((kind, value))
    return joined


def _tools(tools: Any) -> list[dict[str, Any]]:
    """The tools as the models know them: these keys, in this order."""
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"the tools are {brief(tools)}; allowed: a list")
    return _each("tools", tools, _read_tool)


def _read_tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise ValueError(f"a tool is {brief(tool)}; allowed: type function, function: {{name, ...}}")
    _check_keys(tool, "a tool")
    _check_keys(function, "a tool's function")
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(description, (str, type(None))) or not isinstance(parameters, (dict, type(None))):
        raise ValueError(f"a tool has {brief(description)}, {brief(parameters)}; allowed: text, JSON schema")
    read = {"name": _check_name(name), "description": description or "", "parameters": parameters or {}}
    return {"type": "function", "function": read}


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise ValueError(f"a function's name is {brief(name)}; allowed: 1 to 64 letters, digits, '_' or '-'")
    return name


def _load(text: str) -> Any:
    """What JSON text means; {} if it is empty, itself if it is no JSON."""
    try:
        return json.loads(text or "{}")
    except json.JSONDecodeError:
        return text
    except RecursionError as error:
        raise ValueError(f"JSON text is nested too deeply: {brief(text)}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a JSON object has a key twice: {brief([key for key, _ in pairs])}")
    return found


# JSON as models write it: raw line breaks in strings are taken. NaN and Infinity, which JSON does not have,
# are refused, and so is a key that comes twice: its first value would be lost.
WRITTEN_JSON = json.JSONDecoder(
    strict=False, parse_constant=_refuse_constant, object_pairs_hook=_distinct_keys
)


def _first_json(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and the words after it.

    Raises:
        ValueError: no JSON; or what follows may belong to it, as after a quotation mark that should have been
        escaped.
    """
    blanks = " \t\r\n"
    value, end = WRITTEN_JSON.raw_decode(text, len(text) - len(text.lstrip(blanks)))
    words = text[end:].strip(blanks)
    if not words:
        return value, ""
    if words[0] in '{}[],:"' or words[-1] in "}]":
        raise ValueError(f"Extra data after JSON, which may belong to it: {brief(words)}")
    return value, text[end:]


def _whole_json(text: str) -> Any:
    """The JSON value that a whole text is (raises ValueError)."""
    value, words = _first_json(text)
    if words:
        raise ValueError(f"Extra data after JSON: {brief(words)}")
    return value


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{brief(value)} cannot be written as JSON: {error}") from error


def read_chat_template(directory: Path) -> tuple[str, str] | None:
    """The chat template of a model directory, Jinja's text, and the name of the file that holds it; None
    without one. Of named ones it is "default"."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        if path.suffix == ".jinja":
            return name, path.read_text(encoding="utf-8", errors="replace")
        content = read_json(path)
        found = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return name, found
    return None


def _other_layout(directory: Path, tokens: set[str]) -> str:
    """What says that conversations are not laid out as Mistral's models know them; "" if nothing does. The
    template decides where there is one; all of Mistral's have [INST]."""
    template = read_chat_template(directory)
    if template is None:
        found = [token for token in OTHER_TOKENS if token in tokens]
        return f"the tokenizer of {directory} has the token {found[0]}" if found else ""
    name, text = template
    if "[INST]" in text:
        return ""
    marker = OTHER_MARKERS.search(text)
    instead = f", but {marker.group()}" if marker else ""
    return f"the chat template in {directory / name} has no [INST]{instead}"


CACHED_FROM = 2**20  # bytes of a tekken.json below which it is built in no time
CACHE_FORMAT = 1


def _read_tekken(path: Path) -> tuple[Backend, str]:
    """The tokenizer and the version of a tekken.json.

    Its merges are what takes time. They are kept in the user's cache folder, under the hash of the file; what is there
    is used if it is whole, and what cannot be written there is built again the next time.
    """
    content = path.read_bytes()
    cache = _cache_file(content) if len(content) >= CACHED_FROM else None
    if cache is not None:
        with suppress(Exception):  # no such file, a damaged one, or one that this version of the library does not read
            head, _, body = cache.read_bytes().partition(b"\n")
            digest, version = json.loads(head)
            if digest == hashlib.sha256(body).hexdigest():
                return Backend.from_buffer(body), str(version)
    tekken = read_json(path)
    backend = from_tekken(tekken, str(path))
    version = str(tekken["config"].get("version", "missing"))
    if cache is not None:
        body = backend.to_str().encode()
        head = json.dumps([hashlib.sha256(body).hexdigest(), version]).encode()
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            replace_file(cache, lambda temporary: temporary.write_bytes(head + b"\n" + body))
    return backend, version


def _cache_file(content: bytes) -> Path | None:
    """Where the tokenizer built from `content` is kept; None where the user has no folder for such files."""
    here = {"win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local", "darwin": "~/Library/Caches"}
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or here.get(sys.platform, "~/.cache"))
    key = hashlib.sha256(f"{CACHE_FORMAT} {tokenizers.__version__} ".encode() + content).hexdigest()
    return Path(folder, "ministral", f"tekken-{key}.json") if os.path.isabs(folder) else None


def _repair_split(backend: Backend) -> bool:
    """Put Tekken's expression in the place of GPT-4's, wherever that is among the pre-tokenizers; False if nowhere."""
    if backend.pre_tokenizer is None:
        return False
    state = backend.pre_tokenizer.__getstate__().decode()
    state, found = re.subn(WRONG_SPLIT, lambda _: json.dumps(SPLIT), state)
    if found:
        repaired = pre_tokenizers.Sequence([])
        repaired.__setstate__(state.encode())
        backend.pre_tokenizer = repaired
    return found > 0


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
        if len(set(names)) != specials:
            raise ValueError("the special tokens must have different names")
        letters = [word.decode("latin-1").translate(LETTERS) for word in words]
        if both := sorted({*names} & {*letters}):
            raise ValueError(f"{both[0]!r} is the name of a special token and an entry of the vocabulary")
        split = Regex(config["pattern"])
    except Exception as error:  # the library raises bare Exception for a bad expression
        raise ValueError(f"{source} is not a Tekken vocabulary: {type(error).__name__}: {error}") from error

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
