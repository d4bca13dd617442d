"""The published layouts of conversations: one function for each version, the newest first.

Each function returns the ids of a conversation, up to where the answer begins. It is drawn in its docstring. There,
names in brackets, <s> and </s> are special tokens, one id each, and "..." is where an answer begins. Lines end only for
the reader: nothing stands between the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from .bpe import TextTokenizer
from .messages import Message
from .objects import Part, dump_json, join_texts, load_json, read_tools

FIRST, LAST = 0, -1  # the tools stand before this one of the user's turns


class Writer:
    """Writes the pieces of a conversation as ids."""

    def __init__(
        self, tokenizer: TextTokenizer, encode_image: Callable[[Any], list[int]] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.encode_image = encode_image

    def control(self, name: str) -> list[int]:
        """The id of a special token."""
        if name not in self.tokenizer.special_tokens:
            raise ValueError(f"the tokenizer has no special token {name}, which this chat format needs")
        return [self.tokenizer.special_tokens[name]]

    def between(self, name: str, ids: list[int]) -> list[int]:
        """[NAME] ids [/NAME]."""
        return self.control(f"[{name}]") + ids + self.control(f"[/{name}]")

    def text(self, text: str) -> list[int]:
        """The ids of text, in which nothing becomes a special token."""
        return self.tokenizer.encode(text, bos=False)

    def parts(self, parts: Sequence[Part]) -> list[int]:
        """The ids of the parts of a message."""
        ids: list[int] = []
        for kind, value in parts:
            if kind in ("text", "malformed"):
                ids += self.text(value)
            elif kind == "thinking":
                ids += self.thinking(*value)
            else:
                ids += self.image(value)
        return ids

    def thinking(self, text: str, closed: bool) -> list[int]:
        """[THINK]text[/THINK], without the end if the answer goes on thinking."""
        ids = self.control("[THINK]") + self.text(text)
        if closed:
            ids += self.control("[/THINK]")
        return ids

    def image(self, source: Any) -> list[int]:
        """The ids that stand for an image."""
        if self.encode_image is None:
            raise ValueError("an image can only be in a user's message, for a vision model")
        return self.encode_image(source)


# The versions


def v13(writer: Writer, turns: list[Message], tools: Any) -> list[int]:
    """Ministral 3. The tools stand before the first user's turn, results in the order of the calls.

        <s>
        [SYSTEM_PROMPT]system[THINK]thinking[/THINK]system[/SYSTEM_PROMPT]
        [AVAILABLE_TOOLS][{tool}, ...][/AVAILABLE_TOOLS]
        [INST]user[/INST]
        [THINK]thinking[/THINK]words[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 2}</s>
        [TOOL_RESULTS]2[/TOOL_RESULTS]
        [TOOL_RESULTS]3[/TOOL_RESULTS]
        assistant</s>
        [INST]user[/INST]...
    """
    return _conversation(writer, _in_order_of_calls(turns), tools, FIRST, _named_calls, _bare_result)


def v11(writer: Writer, turns: list[Message], tools: Any) -> list[int]:
    """As V13, with ids in calls and results, without thinking. The tools stand before the last user's turn.

        <s>
        [SYSTEM_PROMPT]system[/SYSTEM_PROMPT]
        [INST]user[/INST]
        words[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 2}</s>
        [TOOL_RESULTS]123456789[TOOL_CONTENT]2[/TOOL_RESULTS]
        [TOOL_RESULTS]abcdefghi[TOOL_CONTENT]3[/TOOL_RESULTS]
        assistant</s>
        [AVAILABLE_TOOLS][{tool}, ...][/AVAILABLE_TOOLS]
        [INST]user[/INST]...
    """
    return _conversation(writer, _in_order_of_calls(turns), tools, LAST, _calls_with_ids, _result_after_id)


def v7(writer: Writer, turns: list[Message], tools: Any) -> list[int]:
    """As V11, with the calls in one JSON list. Results stay in the order in which they are given.

        <s>
        [SYSTEM_PROMPT]system[/SYSTEM_PROMPT]
        [INST]user[/INST]
        words[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]</s>
        [TOOL_RESULTS]123456789[TOOL_CONTENT]2[/TOOL_RESULTS]
        assistant</s>
        [AVAILABLE_TOOLS][{tool}, ...][/AVAILABLE_TOOLS]
        [INST]user[/INST]...
    """
    return _conversation(writer, turns, tools, LAST, _listed_calls, _result_after_id)


def v3(writer: Writer, turns: list[Message], tools: Any) -> list[int]:
    """Ministral-8B-Instruct-2410. As V7, with results in JSON. All system prompts are in the last user's turn, and an
    assistant's turn has either words or calls.

        <s>
        [INST]user[/INST]
        [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]</s>
        [TOOL_RESULTS]{"content": 2, "call_id": "123456789"}[/TOOL_RESULTS]
        assistant</s>
        [AVAILABLE_TOOLS][{tool}, ...][/AVAILABLE_TOOLS]
        [INST]system\\n\\nuser[/INST]...
    """
    return _conversation(writer, _system_in_last_user(turns), tools, LAST, _listed_calls, _json_result)


Layout = Callable[[Writer, list[Message], Any], list[int]]
LAYOUTS: dict[str, Layout] = {"v3": v3, "v7": v7, "v11": v11, "v13": v13}
VERSIONS = tuple(LAYOUTS)


def _conversation(
    writer: Writer,
    turns: list[Message],
    tools: Any,
    tools_before: int,
    write_calls: Callable[[Writer, Sequence[dict[str, Any]]], list[int]],
    write_result: Callable[[Writer, Message], list[int]],
) -> list[int]:
    """The frame of all layouts: the turns in order, with the tools before the first or the last user's."""
    users = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if tools and not users:
        raise ValueError("tools are shown with a user's message, and there is none")
    ids = writer.tokenizer.encode("")
    for place, turn in enumerate(turns):
        if turn.role == "system":
            ids += writer.between("SYSTEM_PROMPT", writer.parts(join_texts(turn.parts)))
        elif turn.role == "user":
            if tools and place == users[tools_before]:
                ids += writer.between("AVAILABLE_TOOLS", writer.text(dump_json(read_tools(tools))))
            ids += writer.between("INST", writer.parts(turn.parts))
        elif turn.role == "assistant":
            ids += writer.parts(turn.parts)
            ids += write_calls(writer, turn.calls)
            if not turn.prefix:
                ids += writer.control("</s>")
        else:
            ids += writer.between("TOOL_RESULTS", write_result(writer, turn))
    return ids


# How they write calls


def _named_calls(writer: Writer, calls: Sequence[dict[str, Any]]) -> list[int]:
    ids: list[int] = []
    for call in calls:
        ids += writer.control("[TOOL_CALLS]") + writer.text(call["name"])
        ids += _arguments(writer, call)
    return ids


def _calls_with_ids(writer: Writer, calls: Sequence[dict[str, Any]]) -> list[int]:
    ids: list[int] = []
    for call in calls:
        ids += writer.control("[TOOL_CALLS]") + writer.text(call["name"])
        ids += writer.control("[CALL_ID]") + writer.text(call["id"])
        ids += _arguments(writer, call)
    return ids


def _arguments(writer: Writer, call: dict[str, Any]) -> list[int]:
    return writer.control("[ARGS]") + writer.text(dump_json(call["arguments"]))


def _listed_calls(writer: Writer, calls: Sequence[dict[str, Any]]) -> list[int]:
    if not calls:
        return []
    return writer.control("[TOOL_CALLS]") + writer.text(dump_json(calls))


# How they write results


def _result_text(turn: Message) -> str:
    texts = [text for _, text in join_texts(turn.parts)]  # there is one at most
    return "".join(texts)


def _bare_result(writer: Writer, turn: Message) -> list[int]:
    return writer.text(_result_text(turn))


def _result_after_id(writer: Writer, turn: Message) -> list[int]:
    assert turn.call_id is not None  # these versions need an id
    ids = writer.text(turn.call_id)
    return ids + writer.control("[TOOL_CONTENT]") + writer.text(_result_text(turn))


def _json_result(writer: Writer, turn: Message) -> list[int]:
    result = {"content": load_json(_result_text(turn)), "call_id": turn.call_id}
    return writer.text(dump_json(result))


# Where they put turns


def _in_order_of_calls(turns: list[Message]) -> list[Message]:
    """The turns, with neighbouring results in the order of their calls."""
    ordered: list[Message] = []
    for role, group in groupby(turns, key=lambda turn: turn.role):
        neighbours = list(group)
        if role == "tool":
            neighbours.sort(key=lambda turn: turn.call_place)
        ordered += neighbours
    return ordered


def _system_in_last_user(turns: list[Message]) -> list[Message]:
    """The turns without system prompts, which all go into the last user's turn. An empty user's turn is put first if
    the conversation does not begin with one."""
    prompts = [join_texts(turn.parts) for turn in turns if turn.role == "system" and turn.parts]
    texts = ["".join(text for _, text in parts) for parts in prompts]  # there is one in each at most
    system = "\n\n".join(texts)
    turns = [turn for turn in turns if turn.role != "system"]
    if turns[0].role != "user":
        turns.insert(0, Message("user", []))
    if not system:
        return turns
    last = max(place for place, turn in enumerate(turns) if turn.role == "user")
    parts = [("text", system + "\n\n"), *turns[last].parts]
    if all(kind == "text" for kind, _ in parts):
        parts = [("text", "".join(text for _, text in parts))]
    turns[last] = Message("user", parts)
    return turns
