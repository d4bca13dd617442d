"""Checks of the objects in a conversation: the parts of a message, tool calls and tools.

Each object is read key by key. A key that is not read is refused, unless its value is empty.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from checks import brief

# The keys that are read of each object of a conversation. Any other is refused by name. Some are checked and
# change no id: the "name" of a result, the "index" of a call, the "detail" of an image, and the "error" of a
# malformed call.
KEYS = {
    "a message of role system": ("role", "content"),
    "a message of role user": ("role", "content"),
    "a message of role assistant": (
        "role",
        "content",
        "reasoning_content",
        "reasoning",
        "tool_calls",
        "malformed_calls",
        "prefix",
    ),
    "a message of role tool": ("role", "content", "tool_call_id", "name"),
    "a part of type text": ("type", "text"),
    "a part of type image": ("type", "image", "url", "path", "base64"),
    "a part of type image_url": ("type", "image_url"),
    "a part of type thinking": ("type", "thinking", "closed"),
    "an image_url": ("url", "detail"),
    "a tool": ("type", "function"),
    # mistral-common ignores strict, too
    "a tool's function": ("name", "description", "parameters", "strict"),
    "a tool call": ("id", "type", "function", "index"),
    "a tool call's function": ("name", "arguments"),
    "a malformed call": ("text", "error"),
    "a tool call that the model wrote": ("name", "arguments", "id", "type"),
}
# Keys of OpenAI's interface that no layout has a place for.
OPENAI_KEYS = {
    "name",
    "refusal",
    "annotations",
    "audio",
    "function_call",
    "parsed",
    "parsed_arguments",
    "strict",
}
# Clients send keys without a value. These may be in any of the objects if they are empty.
MAY_BE_EMPTY = OPENAI_KEYS.union(*KEYS.values())
IMAGE_SOURCES = ("image", "url", "path", "base64")

# A checked part: ("text", text), ("malformed", text), ("image", source) or ("thinking", (text, closed)).
Part = tuple[str, Any]


# Checks that all objects share


def read_each(name: str, items: Iterable[Any], read: Callable[[Any], Any]) -> list[Any]:
    """The result of `read` for each item. An error names the item."""
    results = []
    for place, item in enumerate(items):
        try:
            results.append(read(item))
        except ValueError as error:
            raise ValueError(f"{name}[{place}]: {error}") from error
    return results


def check_keys(holder: Mapping[Any, Any], what: str) -> None:
    """Raise ValueError if an object has a key that is not read (see `KEYS`), with a value that is not empty."""
    for key, value in holder.items():
        if key in KEYS[what]:
            continue
        if key in MAY_BE_EMPTY and _is_empty(value):
            continue
        supported = ", ".join(KEYS[what])
        raise ValueError(
            f"{brief(key)}: {brief(value)} is not supported in {what}; supported: {supported}. Leave it out"
        )


def _is_empty(value: Any) -> bool:
    """Whether a value of JSON is null, false, or has no content."""
    if isinstance(value, (str, list, tuple, Mapping)):
        return not value
    return value is None or value is False


def check_list(message: Mapping[str, Any], key: str) -> Sequence[Any]:
    """The list under a key of a message, empty if there is none."""
    items = message.get(key)
    if items is None:
        return ()
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"{key} is {brief(items)}; allowed: a list")
    return items


def check_text(value: Any, key: str) -> str:
    """The value, which must be text."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {brief(value)}; allowed: text")
    return value


def check_name(name: Any) -> str:
    """The name of a function, which must be one that all layouts can write."""
    if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise ValueError(f"a function's name is {brief(name)}; allowed: 1 to 64 letters, digits, '_' or '-'")
    return name


# Parts of a message


def read_part(part: Any) -> Part:
    """The kind and the value of a part of a message."""
    kind = None
    if isinstance(part, Mapping):
        kind = part.get("type")
    if not isinstance(kind, str) or f"a part of type {kind}" not in KEYS:
        supported = "an object of type text, image, image_url or thinking"
        raise ValueError(f"a part is {brief(part)}; supported: {supported}")
    check_keys(part, f"a part of type {kind}")
    if kind == "image":
        return "image", _image_source(part)
    if part.get(kind) is None:
        raise ValueError(f"a part of type {kind} has no {kind}")
    if kind == "image_url":
        return "image", _image_url(part["image_url"])
    if kind == "thinking":
        return "thinking", _thinking(part)
    return "text", check_text(part["text"], "text")


def _thinking(part: Mapping[str, Any]) -> tuple[str, bool]:
    """The text of a part of type thinking, and whether [/THINK] follows it."""
    thinking = part["thinking"]
    closed = part.get("closed", True)
    if not isinstance(closed, bool):
        raise ValueError(f"closed is {brief(closed)}; allowed: true or false")
    if isinstance(thinking, (list, tuple)):
        inner = read_each("thinking", thinking, read_part)
        if any(kind != "text" for kind, _ in inner):
            raise ValueError(f"thinking is {brief(thinking)}; allowed: text, or a list of parts of type text")
        thinking = "".join(text for _, text in inner)
    return check_text(thinking, "thinking"), closed


def _image_source(part: Mapping[str, Any]) -> Any:
    """The source in a part of type image, as `images.load_image` takes it."""
    given = [key for key in IMAGE_SOURCES if not _is_empty(part.get(key))]
    if len(given) != 1:
        described = "no source"
        if given:
            described = " and ".join(given)
        allowed = ", ".join(IMAGE_SOURCES)
        raise ValueError(f"a part of type image has {described}; allowed: one of the keys {allowed}")
    key = given[0]
    source = part[key]
    if key == "image":
        return source
    if key == "path" and isinstance(source, os.PathLike):
        source = os.fspath(source)
    source = check_text(source, key)
    if key == "base64" and source[:5].lower() != "data:":
        return f"data:image;base64,{source}"
    return source


def _image_url(value: Any) -> str:
    """The source in a part of type image_url."""
    if not isinstance(value, Mapping):
        if value == "":
            raise ValueError("image_url is empty; allowed: an address, or {url: address}")
        return check_text(value, "image_url")
    check_keys(value, "an image_url")
    if _is_empty(value.get("url")):
        raise ValueError("an image_url has no url")
    detail = value.get("detail")
    if detail not in (None, "", "auto", "high"):
        raise ValueError(f"detail {brief(detail)} is not supported; supported: auto, high")
    return check_text(value["url"], "url")


def join_texts(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbouring texts joined by an empty line, and without empty texts."""
    joined: list[Part] = []
    for kind, value in parts:
        if kind == "text" and not value:
            continue
        if kind == "text" and joined and joined[-1][0] == "text":
            joined[-1] = ("text", joined[-1][1] + "\n\n" + value)
        else:
            joined.append((kind, value))
    return joined


# Tool calls and tools


def read_call(call: Any, version: str) -> dict[str, Any]:
    """{"name", "arguments", "id"} of a tool call, the id only if there is one. Arguments that are no JSON stay text,
    as in mistral-common."""
    function = _function_of(call)
    if function is None:
        allowed = "type function, function: {name, arguments}"
        raise ValueError(f"a tool call is {brief(call)}; allowed: {allowed}")
    check_keys(call, "a tool call")
    check_keys(function, "a tool call's function")
    index = call.get("index")  # the position of the call in a stream
    if index is not None and type(index) is not int:
        raise ValueError(f"a tool call's index is {brief(index)}; allowed: a whole number")

    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (str, Mapping)):
        allowed = "a JSON object, or its text"
        raise ValueError(f"a tool call's arguments are {brief(arguments)}; allowed: {allowed}")
    if not arguments:
        arguments = {}
    if not isinstance(arguments, str):
        arguments = dump_json(arguments)
    checked = {"name": check_name(function.get("name")), "arguments": load_json(arguments)}

    call_id = call.get("id")
    check_call_id(call_id, version)
    if call_id is not None:
        checked["id"] = call_id
    return checked


def check_call_id(call_id: Any, version: str) -> None:
    """Raise ValueError if a version does not take the id of a tool call."""
    if version == "v13":
        if call_id is None:
            return
        if not isinstance(call_id, str) or call_id in ("", "null"):
            allowed = "text but '' and 'null', or none"
            raise ValueError(f"a tool call's id is {brief(call_id)}; allowed in v13: {allowed}")
    elif not isinstance(call_id, str) or not re.fullmatch("[a-zA-Z0-9]{9}", call_id):
        raise ValueError(f"a tool call's id is {brief(call_id)}; allowed in {version}: 9 letters or digits")


def read_malformed(call: Any) -> Part:
    """A malformed call of `decode_chat`, which is words in the history."""
    if not isinstance(call, Mapping):
        raise ValueError(f"a malformed call is {brief(call)}; allowed: {{text, error}}")
    check_keys(call, "a malformed call")
    return "malformed", check_text(call.get("text"), "text")


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools as the models know them: these keys, in this order."""
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"the tools are {brief(tools)}; allowed: a list")
    return read_each("tools", tools, _read_tool)


def _read_tool(tool: Any) -> dict[str, Any]:
    function = _function_of(tool)
    if function is None:
        raise ValueError(f"a tool is {brief(tool)}; allowed: type function, function: {{name, ...}}")
    check_keys(tool, "a tool")
    check_keys(function, "a tool's function")
    description = function.get("description")
    parameters = function.get("parameters")
    if not isinstance(description, (str, type(None))) or not isinstance(parameters, (dict, type(None))):
        raise ValueError(f"a tool has {brief(description)}, {brief(parameters)}; allowed: text, JSON schema")
    checked = {"name": check_name(function.get("name")), "description": "", "parameters": {}}
    if description:
        checked["description"] = description
    if parameters:
        checked["parameters"] = parameters
    return {"type": "function", "function": checked}


def _function_of(holder: Any) -> Mapping[str, Any] | None:
    """The function in a tool or a tool call; None if it is not an object of type function that has one."""
    if not isinstance(holder, Mapping) or holder.get("type", "function") != "function":
        return None
    function = holder.get("function")
    if not isinstance(function, Mapping):
        return None
    return function


# JSON


def load_json(text: str) -> Any:
    """The value of JSON text; {} if the text is empty, the text itself if it is no JSON."""
    if not text:
        return {}
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except RecursionError as error:
        raise ValueError(f"JSON text is nested too deeply: {brief(text)}") from error
    except ValueError as error:  # Python reads no numbers of more than 4300 digits
        raise ValueError(f"JSON text has a number of thousands of digits: {brief(text)}") from error


def dump_json(value: Any) -> str:
    """JSON text of a value."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{brief(value)} cannot be written as JSON: {error}") from error
