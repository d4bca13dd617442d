"""Text and conversations to ids and back.

    bpe        the vocabulary: `tekken.json` or `tokenizer.json`, text <-> ids
    objects    the parts, tool calls and tools of a conversation, checked
    messages   the messages of a conversation as turns
    layouts    turns to ids: `v13`, `v11`, `v7` and `v3`
    answers    ids of an answer to the assistant's message
    templates  whether a directory's chat template is Mistral's

The package knows no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from .answers import SWITCHES, ChatStream, decode_chat, switches
from .bpe import (
    BYTES,
    LETTERS,
    SPECIAL_TOKENS,
    SPLIT,
    TEKKEN,
    TOKENIZER,
    StopText,
    TextStream,
    TextTokenizer,
    from_tekken,
    read_tekken,
    read_tokenizer_json,
    repair_split,
    special_token_names,
)
from .layouts import LAYOUTS, VERSIONS, Writer
from .messages import ROLES, content_with_thinking, read_turns, split_thinking
from .objects import IMAGE_SOURCES, KEYS, MAY_BE_EMPTY, brief
from .templates import read_chat_template, sign_of_other_layout

__all__ = [
    "BYTES",
    "IMAGE_SOURCES",
    "KEYS",
    "LETTERS",
    "MAY_BE_EMPTY",
    "ROLES",
    "SPECIAL_TOKENS",
    "SPLIT",
    "SWITCHES",
    "TEKKEN",
    "TOKENIZER",
    "VERSIONS",
    "ChatStream",
    "StopText",
    "TextStream",
    "Tokenizer",
    "brief",
    "content_with_thinking",
    "from_tekken",
    "read_chat_template",
    "special_token_names",
    "split_thinking",
]


class Tokenizer(TextTokenizer):
    """Encodes text and conversations into ids and decodes ids.

    Attributes, beside those of `TextTokenizer`:
        version: the layout of conversations, one of `VERSIONS`; with another one text works, `encode_chat` does not.
        other_layout: a sign that the layout is not Mistral's, or "". `encode_chat` refuses if there is one.
    """

    def __init__(self, backend: Backend, version: str | None = None) -> None:
        super().__init__(backend, version)
        self.other_layout = ""

    @classmethod
    def from_dir(cls, directory: str | Path, version: str | None = None) -> Tokenizer:
        """Read the tokenizer of a model directory. tekken.json is preferred, as in Mistral's own tools. A large one is
        read faster the second time (see `bpe.read_tekken`).

        Args:
            directory: holds tekken.json or tokenizer.json.
            version: the layout of conversations; by default the one that tekken.json names, or that the special tokens
                of tokenizer.json suggest ([THINK]: v13; [ARGS]: v11; [SYSTEM_PROMPT]: v7; else v3). Also by default,
                `encode_chat` refuses where the chat template or the tokens show a layout that is not Mistral's.

        Raises:
            FileNotFoundError: the directory holds neither file.
            ValueError: the file is not a tokenizer, or the file of the chat template is not JSON.
        """
        directory = Path(directory)
        path = directory / TOKENIZER
        if (directory / TEKKEN).is_file():
            backend, named = read_tekken(directory / TEKKEN)
            if version:
                named = version
            tokenizer = cls(backend, named)
        elif path.is_file():
            backend = read_tokenizer_json(path)
            tokenizer = cls(backend, version)
            # A vocabulary without [INST] is not Mistral's. Llama 3, for example, needs GPT-4's expression.
            if "[INST]" in tokenizer.special_tokens and repair_split(backend):
                warnings.warn(f"{path} splits text by GPT-4's expression; Tekken's is used", stacklevel=2)
        else:
            raise FileNotFoundError(f"{directory} holds neither {TEKKEN} nor {TOKENIZER}")

        if version is None:
            added = {token.content for token in tokenizer._added_tokens.values()}
            tokenizer.other_layout = sign_of_other_layout(directory, added)
        return tokenizer

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
        """The ids of a conversation, up to where the answer begins, in the layout of `version` (see `layouts`).

        Ids are joined, never text: the text of a user stays text. The ids are mistral-common's. The order of roles is
        free, though, but for the rules under Raises. As in mistral-common, consecutive messages of a user (of the
        assistant) are one, and their texts and those of neighbouring parts are joined by an empty line. An image that
        follows one text is put before it. Blanks at the end of the assistant's words are dropped where there is no
        thinking.

        Transformers' chat templates differ in four places: they round image sizes in another way, keep those blanks,
        add a default system prompt where there is none, and let special tokens typed by a user through. (They also keep
        the JSON of tools, calls and results as it was written, and the order of the results.)

        Args:
            messages: {"role": "system", "user", "assistant" or "tool", "content": text or list of parts}. A part is
                {"type": "text", "text": text}, {"type": "thinking", "thinking": text or list of text parts, "closed":
                bool} (V13: system, assistant), or an image (users): {"type": "image", one of "image", "url", "path",
                "base64": source} or {"type": "image_url", "image_url": source or {"url": source}}. An assistant's
                message may have "reasoning_content" or "reasoning": text, which is thinking before the content,
                "tool_calls": [{"id": text, "type": "function", "function": {"name": text, "arguments": JSON text or
                object}}], and the "malformed_calls" of `decode_chat`, which are words after the content. The last
                message with "prefix": True is continued by the answer. A tool's has the "tool_call_id" that it
                answers. Every other key is refused, unless it is one of `MAY_BE_EMPTY` and has no value (None, False,
                no text).
            tools: {"type": "function", "function": {"name", "description", "parameters": JSON schema}}.
            encode_image: gives the ids that stand for a source (see `chat.encode_messages`).

        Raises:
            ValueError: an unknown role, part, type or key; a part in the wrong place; an empty assistant message (in V3
                also one with words and calls); a last message that is neither the user's nor a tool's nor a prefix; a
                result that answers no open call; a call still open when the assistant goes on; a call without the id
                that the version needs (nine letters or digits; in V13 any, or none: results then answer the calls in
                turn); tools without a user; or a tokenizer without the special tokens or of another layout.
        """
        self.check_layout()
        turns = read_turns(messages, self.version)
        layout = LAYOUTS[self.version]
        return layout(Writer(self, encode_image), turns, tools)

    def switches(self) -> dict[int, str]:
        """The ids after which an answer is of another kind: "thinking" (in V13), "text", or "call"."""
        return switches(self)

    def decode_chat(self, ids: Iterable[int], kind: str = "text") -> dict[str, Any]:
        """The assistant's message in generated ids, up to "</s>", as `encode_chat` takes it: {"role": "assistant",
        "content": text, or a list of parts where there is thinking}, and where there are some:

            "tool_calls": [{"id", "type": "function", "function": {"name", "arguments": object}}], without id in V13;
            "malformed_calls": [{"text": the text as written, "error": the reason why it cannot be read}].

        The special tokens of a call tell its form, not the version. [TOOL_CALLS] ends thinking: a call in it is a call,
        and the thinking is not closed. [/THINK] without [THINK] ends the thinking that the prompt began.

        Calls are read as models write them: strings may hold raw line breaks, arguments may be an object in JSON text,
        one call may stand without its list. The version may need an id. If it is missing, not of its form or given
        before, a new one replaces it. Words after a call are kept in `malformed_calls`. So is a call that could be read
        in two ways, or that `encode_chat` would refuse, as it was written.

        Args:
            kind: the kind with which the ids begin; "thinking" if the prompt ends within thinking.
        """
        return decode_chat(self, ids, kind)
