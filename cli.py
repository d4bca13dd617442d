"""Functions that the commands of this project share: option parsing, exit codes, sizes in words, a progress bar."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from checkpoint import SETTINGS

MOST_BYTES = 64 * 10**6  # of a file of text or JSON that an option names


class Parser(argparse.ArgumentParser):
    """An argument parser that reports wrong use in one line, in the words of the options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does. An unknown argument is an error here, where the options are known."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return options, unknown

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"{argument!r} is one argument too many; a text with blanks needs quotes"
        name = argument.partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        if near:
            return f"{name} is not an option; did you mean {near[0]}?"
        return f"{name} is not an option; a text that begins with - goes after --"

    def error(self, message: str) -> NoReturn:
        """Print one line on standard error and exit with code 2."""
        message = re.sub("^argument ([^:]+): (.* is impossible; )", r"\1 \2", message)
        message = message.removeprefix("argument ")
        print(f"error: {one_line(message)} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def setting_type(name: str) -> Callable[[str], Any]:
    """The `type` of an option that sets one of `SETTINGS`. Its error says which values are allowed."""
    allowed, valid = SETTINGS[name]

    def convert(text: str) -> Any:
        if name == "stop_strings" and text:
            return text
        for kind in (int, float):
            with suppress(ValueError):
                if valid(kind(text)):
                    return kind(text)
        value = text
        if not text:
            value = "''"
        one_value = allowed.partition(", or")[0]
        raise argparse.ArgumentTypeError(f"{value} is impossible; give {one_value}")

    return convert


def exit_code(command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code. An error is one line on standard error, and so is each warning. An error
    of this project's code is a traceback, and the exit code is 2, too: 1 is a verdict of `reference diff`."""
    for name in ("stdout", "stderr"):  # None after `>&-`, and Python would print errors to the other one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    warnings.showwarning = lambda message, *_, **__: print(f"note: {one_line(message)}", file=sys.stderr)
    try:
        return command()
    except BrokenPipeError:  # stdout was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 2


def one_line(message: object) -> str:
    """A message on one line. A long one, which repeats a long argument, is shortened. Characters of names that are not
    printable are escaped: a terminal would obey them."""
    words = " ".join(str(message).split())
    if len(words) > 450:
        words = f"{words[:220]} ... {words[-180:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def read_file(path: str, option: str) -> bytes:
    """The content of the file that an option names, - for standard input.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer than `MOST_BYTES`.
    """
    if not path:
        raise FileNotFoundError(f"{option} '' names no file; give a file that can be read")
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(path).expanduser().open("rb") as file:
                data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise OSError(f"{option} {path}: {error.strerror}; give a file that can be read") from error
    if len(data) > MOST_BYTES:
        raise ValueError(f"{option} {path} is too long; allowed: {format_bytes(MOST_BYTES)}")
    return data


def read_text(path: str, option: str) -> str:
    """The same as text (raises ValueError, too, if it is not UTF-8)."""
    return decode(read_file(path, option), f"{option} {path}")


def decode(data: bytes, name: str) -> str:
    """Bytes as text; raises ValueError, which has `name`, if they are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def format_bytes(count: float) -> str:
    """A number of bytes in words: 1234567 -> "1.2 MB"."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def progress_bar() -> Callable[[int, int], object]:
    """A function for `on_prompt` that draws a bar on standard error for prompts that take longer than two seconds."""
    bar: Any = None

    def show(read: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc="reading", unit=" tokens", delay=2, leave=False, file=sys.stderr)
        bar.update(read - bar.n)
        if read == total:
            bar.close()

    return show
