"""From the ids of an answer to the assistant's message, at once (`decode_chat`) or while it grows (`ChatStream`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from itertools import count, takewhile
from typing import Any

from checks import brief

from .bpe import TextStream, TextTokenizer
from .objects import check_call_id, check_keys, read_call

# The kind of an answer after a special token.
SWITCHES = {"[THINK]": "thinking", "[/THINK]": "text", "[TOOL_CALLS]": "call"}


def switches(tokenizer: TextTokenizer) -> dict[int, str]:
    """The ids after which an answer is of another kind: "thinking" (in V13), "text", or "call"."""
    kinds = {"[TOOL_CALLS]": "call"}
    if tokenizer.version == "v13":
        kinds = SWITCHES
    ids = tokenizer.special_tokens
    return {ids[name]: kind for name, kind in kinds.items() if name in ids}


class ChatStream:
    """`TextStream` for a chat's answer: `push` returns the kind ("text", "thinking" or "call") and the characters.

    A special token that begins another kind returns the rest of the one before; `decode_chat` reads the calls. An
    answer begins with words, or with another `kind`.
    """

    def __init__(self, tokenizer: TextTokenizer, kind: str = "text") -> None:
        self.kind = kind
        self._stream = TextStream(tokenizer)
        self._switches = switches(tokenizer)

    def push(self, i: int) -> tuple[str, str]:
        if i not in self._switches:
            return self.kind, self._stream.push(i)
        rest = self.close()
        self.kind = self._switches[i]
        return rest

    def close(self) -> tuple[str, str]:
        return self.kind, self._stream.close()


def decode_chat(tokenizer: TextTokenizer, ids: Iterable[int], kind: str = "text") -> dict[str, Any]:
    """See `Tokenizer.decode_chat`."""
    runs = _split_runs(tokenizer, ids, kind)
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    malformed: list[dict[str, str]] = []
    for kind, run in runs:
        if kind == "call":
            try:
                if tokenizer.version == "v3" and parts:
                    raise ValueError("a tool call after words; v3 allows one of them")
                given_ids = {call.get("id") for call in calls}
                new_calls, words = _read_calls(tokenizer, run, given_ids)
                calls += new_calls
                if words:
                    malformed.append({"text": words, "error": "words after a tool call, no part of it"})
            except (ValueError, RecursionError) as error:
                text = "[TOOL_CALLS]" + _text_of(tokenizer, run, False)
                malformed.append({"text": text, "error": str(error)})
        elif kind == "text":
            text = _text_of(tokenizer, run)
            if text:
                parts.append({"type": "text", "text": text})
        elif run or kind == "thought" or len(runs) > 1:
            text = _text_of(tokenizer, run)
            parts.append({"type": "thinking", "thinking": text, "closed": kind == "thought"})

    message: dict[str, Any] = {"role": "assistant", "content": _content(parts)}
    if calls:
        message["tool_calls"] = calls
    if malformed:
        message["malformed_calls"] = malformed
    return message


def _content(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a message: text where there are only words in one piece, else the parts."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts


def _split_runs(tokenizer: TextTokenizer, ids: Iterable[int], kind: str) -> list[tuple[str, list[int]]]:
    """The ids of an answer, cut where it goes on with another kind: "text", "call", "thinking" that is open, or
    "thought", which is closed."""
    kinds = switches(tokenizer)
    close = tokenizer.special_tokens.get("[/THINK]")
    runs: list[tuple[str, list[int]]] = [(kind, [])]
    for i in takewhile(lambda i: i != tokenizer.eos_token_id, map(int, ids)):
        if i not in kinds:
            runs[-1][1].append(i)
            continue
        kind, run = runs[-1]
        if i == close and kind != "call":
            runs[-1] = ("thought", run)
        runs.append((kinds[i], []))
    return runs


def _text_of(tokenizer: TextTokenizer, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """As `Tokenizer.decode`, also of ids that only the model has."""
    content = b"".join(tokenizer.any_to_bytes(i, skip_special_tokens) for i in ids)
    return content.decode("utf-8", errors="replace")


# Tool calls


def _read_calls(
    tokenizer: TextTokenizer, ids: list[int], taken: set[Any]
) -> tuple[list[dict[str, Any]], str]:
    """The calls after one [TOOL_CALLS], and the words after them. `taken`: the ids of the calls before.

    Raises:
        ValueError, RecursionError: they are no calls, or not as `encode_chat` takes them.
    """
    written, words = _written_calls(tokenizer, ids)
    if not isinstance(written, list) or not written or not all(isinstance(call, dict) for call in written):
        raise ValueError(f"tool calls are {brief(written)}; allowed: a list of objects")
    calls = []
    for call in written:
        check_keys(call, "a tool call that the model wrote")
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            arguments = _whole_json(arguments)
        if not isinstance(arguments, dict):
            raise ValueError(f"a tool call's arguments are {brief(arguments)}; allowed: a JSON object")
        checked: dict[str, Any] = {}
        call_id = _usable_id(call.get("id"), taken, tokenizer.version)
        taken = taken | {call_id}
        if call_id is not None:
            checked["id"] = call_id
        checked["type"] = call.get("type", "function")
        checked["function"] = {"name": call.get("name"), "arguments": arguments}
        read_call(checked, tokenizer.version)
        calls.append(checked)
    return calls, words


def _written_calls(tokenizer: TextTokenizer, ids: list[int]) -> tuple[Any, str]:
    """The calls as the model wrote them, and the words after them: name[ARGS]arguments,
    name[CALL_ID]id[ARGS]arguments, or a JSON list."""
    text = _text_of(tokenizer, ids, False)
    if tokenizer.special_tokens.get("[ARGS]") not in ids:
        value, words = _first_json(text)
        if isinstance(value, dict):
            value = [value]
        return value, words
    head, _, arguments = text.partition("[ARGS]")
    name, has_id, call_id = head.partition("[CALL_ID]")
    value, words = _first_json(arguments)
    call = {"name": name.strip(), "arguments": value}
    if has_id:
        call["id"] = call_id
    return [call], words


def _usable_id(call_id: Any, taken: set[Any], version: str) -> Any:
    """The id that a model wrote; None in V13 if there is none. A new one if the version does not take it, or if it is
    taken: an id only ties a result to its call, so any other does the same."""
    with suppress(ValueError):
        check_call_id(call_id, version)
        if call_id is None or call_id not in taken:
            return call_id
    for number in count():
        content = f"{number} {brief(call_id)}".encode(errors="replace")
        digest = hashlib.sha256(content).hexdigest()[:9]
        if digest not in taken:
            return digest


# JSON as models write it


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise ValueError(f"a JSON object has a key twice: {brief([key for key, _ in pairs])}")
    return items


# Raw line breaks in strings are taken. NaN and Infinity, which JSON does not have, are refused. So is a key that comes
# twice: its first value would be lost.
WRITTEN_JSON = json.JSONDecoder(
    strict=False, parse_constant=_refuse_constant, object_pairs_hook=_distinct_keys
)


def _first_json(text: str) -> tuple[Any, str]:
    """The JSON value that a text begins with, and the words after it.

    Raises:
        ValueError: no JSON; or the rest may belong to it, as after a quotation mark that should have been escaped.
    """
    blanks = " \t\r\n"
    start = len(text) - len(text.lstrip(blanks))
    value, end = WRITTEN_JSON.raw_decode(text, start)
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
