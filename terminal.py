"""A conversation in the terminal (`converse`), and text that is printed as its tokens arrive (`Writer`).

`python generate.py --chat` runs `converse`; its commands are in `HELP`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import checkpoint
from chat import Conversation, awaits_user, open_calls, take_back
from checkpoint import GenerationConfig
from cli import progress_bar, read_text
from model_types import GenerativeModel
from settings import ending_ids
from tokenizer import ChatStream, TextStream, Tokenizer, split_thinking

# -------------------------------------------------------------------------------------------- text on the screen


class Writer:
    """Prints text as its tokens arrive, whole characters only, and nothing from a stop text on. Of an answer in a chat
    it prints the words, and the thinking if it is to be shown; tool calls are read at the end.

    Args:
        kind: of an answer in a chat, the kind of text that it begins with; None for plain text.

    Attributes:
        text: the text so far, without thinking.
        cut: whether a stop text ended it.
        ids, times: the new tokens, and when each came.
        stopped: ends the text before the next token; set by a stop text, or from outside.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        print_now: bool,
        kind: str | None = None,
        show_thinking: bool = False,
    ) -> None:
        self.stream: TextStream | ChatStream = TextStream(tokenizer)
        if kind is not None:
            self.stream = ChatStream(tokenizer, kind)
        self.stops = [stop for stop in stops if stop]
        self.print_now = print_now
        self.show_thinking = show_thinking
        self.text = ""
        self.printed = 0  # characters of the text
        self.stopped = False
        self.cut = False
        self.in_thinking = False  # on the screen
        self.ids: list[int] = []
        self.times: list[float] = []

    def on_token(self, row: int, token: int) -> bool:
        self.ids.append(token)
        self.times.append(time.perf_counter())
        self._write(self.stream.push(token))
        return self.stopped

    def close(self) -> None:
        if not self.stopped:
            self._write(self.stream.close(), last=True)
        self._end_thinking()

    def _write(self, piece: str | tuple[str, str], last: bool = False) -> None:
        kind = "text"
        if isinstance(piece, tuple):
            kind, piece = piece
        if kind == "text" and (piece or last):
            self._end_thinking()
            self._write_text(piece, last)
        elif kind == "thinking" and piece and self.show_thinking and self.print_now:
            self._begin_thinking()
            print(piece, end="", flush=True)

    def _begin_thinking(self) -> None:
        """Thinking is dim on a terminal, and between markers elsewhere."""
        if not self.in_thinking:
            sys.stdout.write("\x1b[2m" if sys.stdout.isatty() else "[THINK]")
        self.in_thinking = True

    def _end_thinking(self) -> None:
        if self.in_thinking:
            sys.stdout.write("\x1b[0m\n\n" if sys.stdout.isatty() else "[/THINK]\n")
        self.in_thinking = False

    def _write_text(self, piece: str, last: bool) -> None:
        self.text += piece
        places = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if places:
            self.text = self.text[: min(places)]
            self.stopped = self.cut = True
        ready = len(self.text)
        if not (self.stopped or last):
            ready -= self._undecided()
        if self.print_now and ready > self.printed:
            print(self.text[self.printed : ready], end="", flush=True)
        self.printed = max(self.printed, ready)

    def _undecided(self) -> int:
        """The number of characters at the end of the text that may be the beginning of a stop text."""
        longest = 0
        for stop in self.stops:
            for length in range(1, len(stop)):
                if self.text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest


def cut_message(message: dict[str, Any] | None, writer: Writer) -> None:
    """Remove from an answer the text that a stop text has cut off on the screen."""
    if message is None or not writer.cut:
        return
    parts = message["content"]
    if isinstance(parts, str):
        parts = []
    thinking = [part for part in parts if part["type"] == "thinking"]
    message["content"] = writer.text
    if thinking:
        message["content"] = [*thinking, {"type": "text", "text": writer.text}]


def measure(writer: Writer, start: float) -> dict[str, float | None]:
    """Seconds to the first token and to the last, and tokens per second."""
    first, last = None, time.perf_counter()
    if writer.times:
        first, last = writer.times[0] - start, writer.times[-1]
    seconds = last - start
    rate = len(writer.ids) / max(seconds, 1e-9)
    return {"first_token_seconds": first, "seconds": seconds, "tokens_per_second": rate}


def report_calls(message: Mapping[str, Any] | None) -> None:
    """Print the tool calls of an answer as one line of JSON; malformed ones go to standard error."""
    if message is None:
        return
    if "tool_calls" in message:
        print(json.dumps(message["tool_calls"], ensure_ascii=False), flush=True)
    for call in message.get("malformed_calls", ()):
        print(f"malformed tool call {call['text']!r}: {call['error']}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- the terminal

HELP = """/image FILE   show an image with the next message    /system TEXT_OR_FILE   change the system prompt
/save FILE    write the messages, for --messages     /reset                 begin anew
/exit         end, as Ctrl-D does                    Ctrl-C                 stop the answer
A message that begins with / needs a blank before it. After a tool call, the prompt asks for the result of the
tool: type it. Only /reset, /save and /exit are commands there. Ctrl-C takes the call back."""


def converse(
    conversation: Conversation, model: GenerativeModel, options: argparse.Namespace, settings: dict[str, Any]
) -> int:
    """The conversation in the terminal, until its input ends. An error in one turn is a line, and the turn is undone.
    Returns the exit code.

    Args:
        options: those of the command line: model, stop, show_thinking, seed.
        settings: those of `generate`, without the seed.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` line editing and history
    if sys.stdin.isatty():
        print("/help lists the commands", file=sys.stderr)
    terminal = Terminal(conversation, model, options, settings)
    while True:
        try:
            if not terminal.take_turn():
                return 0
        except EOFError:
            print(file=sys.stderr)
            return 0
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)", file=sys.stderr)
            terminal.undo()
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            print(f"error: {' '.join(str(error).split())} (/reset begins anew)", file=sys.stderr)
            terminal.undo()


def system_prompt(text_or_file: str, model: str) -> Any:
    """The content of a system message: the text itself; of a file its text, in which [THINK]...[/THINK] is thinking and
    {name}, {today}, {yesterday} are filled in, as in Mistral's prompts."""
    path = os.path.expanduser(text_or_file)
    if not os.path.exists(path):
        if is_file_name(text_or_file):
            raise FileNotFoundError(f"--system {text_or_file}: no such file; give a file, or a text of several words")
        return text_or_file
    today = datetime.date.today()
    yesterday = today - datetime.timedelta(days=1)
    values = {"{name}": Path(model).resolve().name, "{today}": str(today), "{yesterday}": str(yesterday)}
    parts = split_thinking(read_text(path, "--system"))
    for part in parts:  # after the split: a directory's name may contain [THINK]
        for place, value in values.items():
            part[part["type"]] = part[part["type"]].replace(place, value)
    return parts


def is_file_name(text: str) -> bool:
    """Whether a text is meant as the name of a file: one word with a folder or an ending in it."""
    return len(text.split()) == 1 and (os.sep in text or text.endswith((".txt", ".md")))


class Terminal:
    """The state of a conversation in the terminal; see `converse` for the arguments.

    Attributes:
        system: the system message, which stays after /reset; [] if there is none.
        images: parts of the next message.
        sent: the images in the message that has no answer yet.
        answers: the number of answers so far.
    """

    def __init__(
        self,
        conversation: Conversation,
        model: GenerativeModel,
        options: argparse.Namespace,
        settings: dict[str, Any],
    ) -> None:
        self.conversation = conversation
        self.model = model
        self.options = options
        self.settings = settings
        self.messages: list[Any] = conversation.messages
        self.system = [message for message in self.messages[:1] if message.get("role") == "system"]
        self.images: list[dict[str, Any]] = []
        self.sent: list[dict[str, Any]] = []
        self.answers = 0

    def take_turn(self) -> bool:
        """Read a line and do it; then let the model answer if a message waits for it. Returns False after /exit."""
        self.sent = []
        if awaits_user(self.messages) and not self._do_line(self._read_line()):
            return False
        if not awaits_user(self.messages):
            seed = self.options.seed
            if seed is not None:
                seed = (seed + self.answers) % 2**63
            reply(self.conversation, self.model, self.options, self.settings | {"seed": seed})
            self.answers += 1
        return True

    def undo(self) -> None:
        """Take back the message without an answer. Its images go with the next message."""
        take_back(self.messages)
        self.images = self.sent + self.images

    def _read_line(self) -> str:
        prompt = ""
        if sys.stdin.isatty():
            prompt = "> "
            calls = open_calls(self.messages)
            if calls:
                prompt = f"result of {calls[0]['function'].get('name')}> "
        try:
            line = input(prompt)
        except OSError as error:  # every later line would fail, too
            print(f"error: the terminal cannot be used: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        return line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # bytes that are not UTF-8

    def _do_line(self, line: str) -> bool:
        """Do a command, or append a message. Returns False after /exit."""
        calls = open_calls(self.messages)
        command, _, argument = line.partition(" ")
        argument = os.path.expanduser(argument.strip())
        if calls and command not in ("/reset", "/save", "/exit"):
            self.messages.append(tool_result(calls[0], line))
        elif command == "/exit":
            return False
        elif command == "/reset":
            self.messages[:] = self.system
            self.images = []
            self.conversation.images.clear()
        elif command == "/save" and argument:
            checkpoint.write_json(Path(argument), self.messages)
            print(f"{len(self.messages)} messages in {argument}", file=sys.stderr)
        elif command == "/system" and argument:
            self._change_system(argument)
        elif command == "/image" and argument:
            self._add_image(argument)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command in ("/save", "/system", "/image"):
            print(f"{command} needs an argument; /help lists the commands", file=sys.stderr)
        elif command.startswith("/"):
            print(f"unknown command {line}; /help lists them", file=sys.stderr)
        elif line.strip():
            self._add_message(line)
        return True

    def _change_system(self, text_or_file: str) -> None:
        content = system_prompt(text_or_file, self.options.model)
        self.system = [{"role": "system", "content": content}]
        others = [message for message in self.messages if message.get("role") != "system"]
        self.messages[:] = self.system + others
        print("the system prompt is changed", file=sys.stderr)

    def _add_image(self, source: str) -> None:
        if os.path.isfile(source):
            source = str(Path(source).resolve())
        self.conversation.images.pop(source, None)  # the file may have changed
        self.conversation.read_image(source)
        self.images.append({"type": "image", "image": source})
        print("the next message shows the image", file=sys.stderr)

    def _add_message(self, line: str) -> None:
        if line.startswith(" /"):
            line = line.removeprefix(" ")
        content = [*self.images, {"type": "text", "text": line}]
        self.messages.append({"role": "user", "content": content})
        self.sent, self.images = self.images, []


def tool_result(call: Mapping[str, Any], content: str) -> dict[str, Any]:
    """The message with the result of a tool call."""
    result = {"role": "tool", "name": call["function"].get("name"), "content": content}
    if "id" in call:
        result["tool_call_id"] = call["id"]
    return result


def reply(
    conversation: Conversation, model: GenerativeModel, options: argparse.Namespace, settings: dict[str, Any]
) -> None:
    """One answer, printed as it comes; the question of an empty answer is taken back. The first Ctrl-C ends the answer
    before the next token, so that the cache stays whole; a second one raises KeyboardInterrupt."""
    kind = conversation.first_kind()
    writer = Writer(conversation.tokenizer, options.stop, True, kind, options.show_thinking)
    interrupted = False

    def stop(*_: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        writer.stopped = interrupted = True

    start = time.perf_counter()
    previous = signal.signal(signal.SIGINT, stop)
    try:
        message = conversation.answer(model, on_token=writer.on_token, on_prompt=progress_bar(), **settings)
    finally:
        signal.signal(signal.SIGINT, previous)
        writer.close()
        print(flush=True)

    messages: list[Any] = conversation.messages
    if messages[-1].get("role") == "assistant":
        cut_message(messages[-1], writer)
    report_calls(message)
    if not awaits_user(messages):
        print("(the answer was empty; the question is taken back)", file=sys.stderr)
        take_back(messages)

    chosen = GenerationConfig(eos_token_id=settings.get("eos_token_id"))
    ends = ending_ids(chosen, conversation.config.get_text_config())
    figures = f"{len(writer.ids)} tokens, {measure(writer, start)['tokens_per_second']:.1f} tokens/s"
    if not writer.stopped and (not writer.ids or writer.ids[-1] not in ends):
        figures += ", cut: --max-new-tokens or the context is used up (/reset begins anew)"
    print(figures, file=sys.stderr)
