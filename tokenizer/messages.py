"""From the messages of a conversation to its turns: checked, in order, each result with its call.

The layouts need little of a message (`Message`). Everything else is checked here, before any id is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from checks import brief

from .objects import (
    Part,
    check_call_id,
    check_keys,
    check_list,
    check_name,
    join_texts,
    read_call,
    read_each,
    read_malformed,
    read_part,
)

ROLES = ("system", "user", "assistant", "tool")


class Message(NamedTuple):
    """A checked message or turn, as the layouts need it."""

    role: str
    parts: list[Part]
    calls: Sequence[dict[str, Any]] = ()  # {"name", "arguments", "id"}, the id only if there is one
    call_id: str | None = None  # a tool's: the id of the call that it answers
    call_place: int = 0  # a tool's: the place of that call among those of its message
    prefix: bool = False


def read_turns(messages: Any, version: str) -> list[Message]:
    """The checked turns: consecutive messages of the user (of the assistant) are one.

    As in mistral-common, an image that follows one text is put before it, and blanks at the end of the assistant's
    words are dropped where there is nothing else.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(f"the messages are {brief(messages)}; allowed: a list of at least one message")
    checked = read_each("messages", messages, partial(_read_message, version=version))
    _check_end(checked)
    checked = _pair_results(checked)
    turns: list[Message] = []
    for role, group in groupby(checked, key=lambda message: message.role):
        members = list(group)
        if role == "user":
            turns.append(_join_user(members))
        elif role == "assistant":
            turns.append(_join_assistant(members, version))
        else:
            turns += members
    return turns


# The order of messages


def _check_end(messages: list[Message]) -> None:
    """Raise ValueError unless an answer can follow the last message."""
    last = messages[-1]
    if last.role not in ("user", "tool") and not last.prefix:
        raise ValueError(
            "the last message must be the user's, a tool's, or one of the assistant with prefix: true; the"
            f" answer follows it, but it is of role {last.role}"
        )
    if any(message.prefix for message in messages[:-1]):
        raise ValueError("prefix: true is only for the last message, which the answer continues")


def _pair_results(messages: list[Message]) -> list[Message]:
    """The messages, with the place of its call in each result. Without ids (V13), results answer the calls in turn."""
    paired = []
    open_calls: dict[int, Any] = {}  # place of the call -> its id
    for message in messages:
        if message.role == "assistant":
            if open_calls:
                ids = brief([*open_calls.values()])
                raise ValueError(f"tool calls {ids} have no result; the assistant waits")
            open_calls = _ids_of_calls(message)
        elif message.role == "tool":
            place = _place_of(message.call_id, open_calls)
            del open_calls[place]
            message = message._replace(call_place=place)
        paired.append(message)
    return paired


def _ids_of_calls(message: Message) -> dict[int, Any]:
    ids = {place: call.get("id") for place, call in enumerate(message.calls)}
    given = [call_id for call_id in ids.values() if call_id is not None]
    if len(set(given)) < len(given):
        raise ValueError(f"tool calls of one message have the ids {brief(given)}; allowed: different ones")
    return ids


def _place_of(call_id: str | None, open_calls: dict[int, Any]) -> int:
    """The place of the open call that a result answers."""
    for place, open_id in open_calls.items():
        if open_id == call_id:
            return place
    allowed = f"those of open calls, {brief([*open_calls.values()])}"
    raise ValueError(f"a result has tool_call_id {brief(call_id)}; allowed: {allowed}")


def _join_user(messages: list[Message]) -> Message:
    """Consecutive messages of the user as one."""
    parts = join_texts(part for message in messages for part in message.parts)
    if [kind for kind, _ in parts] == ["text", "image"]:
        parts.reverse()
    return Message("user", parts)


def _join_assistant(messages: list[Message], version: str) -> Message:
    """Consecutive messages of the assistant as one."""
    parts = join_texts(part for message in messages for part in message.parts)
    calls = [call for message in messages for call in message.calls]
    if not parts and not calls:
        raise ValueError("an assistant message is empty; leave it out, or give its words")
    if version == "v3" and calls and any(kind != "malformed" for kind, _ in parts):
        raise ValueError("an assistant message has words and tool calls; v3 allows one of them")
    if [kind for kind, _ in parts] == ["text"]:
        parts = [("text", parts[0][1].rstrip(" "))]
    return Message("assistant", parts, calls, prefix=messages[-1].prefix)


# One message


def _read_message(message: Any, version: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is {brief(message)}; allowed: an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"role {brief(role)} is not supported; supported: {', '.join(ROLES)}")
    check_keys(message, f"a message of role {role}")
    parts = _read_content(message, role, version)
    if role == "assistant":
        return _read_assistant(message, parts, version)
    if role == "tool":
        return _read_result(message, parts, version)
    return Message(role, parts)


def _read_content(message: Mapping[str, Any], role: str, version: str) -> list[Part]:
    content = content_with_thinking(message)
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        content = _text_as_parts(content)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"the content of a message is {brief(content)}; allowed: text or a list of parts")
    parts = read_each("content", content, read_part)
    kinds = {kind for kind, _ in parts}
    if "image" in kinds and role != "user":
        raise ValueError(f"an image can only be in a user's message, not in one of role {role}")
    if "thinking" in kinds and (role not in ("system", "assistant") or version != "v13"):
        given = f"{role}, {version}"
        raise ValueError(f"thinking is not supported here ({given}); supported: system, assistant in v13")
    return parts


def _text_as_parts(text: str) -> list[dict[str, Any]]:
    if text:
        return [{"type": "text", "text": text}]
    return []


def _read_assistant(message: Mapping[str, Any], parts: list[Part], version: str) -> Message:
    prefix = message.get("prefix", False)
    if not isinstance(prefix, bool):
        raise ValueError(f"prefix is {brief(prefix)}; allowed: true or false")
    malformed = read_each("malformed_calls", check_list(message, "malformed_calls"), read_malformed)
    calls = read_each("tool_calls", check_list(message, "tool_calls"), partial(read_call, version=version))
    return Message("assistant", parts + malformed, calls, prefix=prefix)


def _read_result(message: Mapping[str, Any], parts: list[Part], version: str) -> Message:
    call_id = message.get("tool_call_id")
    check_call_id(call_id, version)
    if message.get("name") is not None:
        check_name(message["name"])
    return Message("tool", parts, call_id=call_id)


# Images


def with_image_sources(messages: Any) -> Any:
    """The messages, in which parts {"type": "image"} without a source have one, for a text of the conversation."""
    if not isinstance(messages, (list, tuple)):
        return messages
    completed = []
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)):
            parts = [_with_source(part) for part in message["content"]]
            message = {**message, "content": parts}
        completed.append(message)
    return completed


def _with_source(part: Any) -> Any:
    if part == {"type": "image"}:
        return {"type": "image", "image": "[IMG]"}
    return part


# Thinking


def content_with_thinking(message: Mapping[str, Any]) -> Any:
    """The content of a message. OpenAI-compatible servers write the assistant's thinking into "reasoning_content" or
    "reasoning". As in mistral-common, it is put before the content."""
    content = message.get("content")
    keys = ("reasoning_content", "reasoning")
    given = [message[key] for key in keys if message.get(key) is not None]
    if not given or message.get("role") != "assistant":
        return content
    if not all(isinstance(thinking, str) for thinking in given):
        raise ValueError(f"reasoning_content or reasoning is {brief(given)}; allowed: text")
    if given[0] != given[-1]:
        raise ValueError("reasoning_content and reasoning differ; give one of them")
    parts = content
    if content is None:
        parts = []
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    if not isinstance(parts, (list, tuple)):
        return content  # `_read_content` refuses it
    if any(isinstance(part, Mapping) and part.get("type") == "thinking" for part in parts):
        raise ValueError("thinking is both in content and in reasoning_content or reasoning; give it once")
    return [{"type": "thinking", "thinking": given[0], "closed": True}, *parts]


def split_thinking(text: str) -> list[dict[str, Any]]:
    """The parts of a system prompt in which [THINK]...[/THINK] stands for thinking, as in SYSTEM_PROMPT.txt of the
    Reasoning models. Only for trusted files: it makes special tokens of text."""
    parts: list[dict[str, Any]] = []
    pattern = r"(.*?)(?:(\[THINK\])(.*?)(\[/THINK\]|\Z)|\Z)"
    for words, begin, thinking, end in re.findall(pattern, text, re.DOTALL):
        if words:
            parts.append({"type": "text", "text": words})
        if begin:
            parts.append({"type": "thinking", "thinking": thinking, "closed": bool(end)})
    return parts
