"""Text and conversations to ids and back.

    bpe        the vocabulary: `tekken.json` or `tokenizer.json`, text <-> ids
    tokens     tokens and ids under Transformers' names
    batches    rows of ids: padding, truncation and tensors, as in Transformers
    streamer   an answer as text while it grows, as in Transformers
    objects    the parts, tool calls and tools of a conversation, checked
    messages   the messages of a conversation as turns
    layouts    turns to ids: `v13`, `v11`, `v7` and `v3`
    answers    ids of an answer to the assistant's message
    templates  whether a directory's chat template is Mistral's

The package knows no model.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as Backend
from torch import Tensor

import checkpoint
from checks import brief

from .answers import SWITCHES, ChatStream, decode_chat, switches
from .batches import (
    SIDES,
    TENSORS,
    BatchEncoding,
    BatchTokenizer,
    expect_choice,
    first_row,
    image_inputs,
    split_conversations,
)
from .bpe import (
    BYTES,
    LETTERS,
    SPECIAL_TOKENS,
    SPLIT,
    TEKKEN,
    TOKENIZER,
    StopText,
    TextStream,
    from_tekken,
    read_tekken,
    read_tokenizer_json,
    repair_split,
    special_token_names,
)
from .layouts import LAYOUTS, VERSIONS, Writer
from .messages import ROLES, content_with_thinking, read_turns, split_thinking, with_image_sources
from .objects import IMAGE_SOURCES, KEYS, MAY_BE_EMPTY
from .streamer import TextIteratorStreamer, TextStreamer
from .templates import read_chat_template, sign_of_other_layout
from .tokens import refuse_unsupported

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
    "BatchEncoding",
    "ChatStream",
    "StopText",
    "TextIteratorStreamer",
    "TextStream",
    "TextStreamer",
    "Tokenizer",
    "content_with_thinking",
    "from_tekken",
    "read_chat_template",
    "special_token_names",
    "split_thinking",
]


AnyTokenizer = TypeVar("AnyTokenizer", bound="Tokenizer")
# The files that belong to a tokenizer.
TOKENIZER_FILES = (
    TEKKEN, "tokenizer*.json", "special_tokens_map.json", "chat_template*", "SYSTEM_PROMPT.txt",
)  # fmt: skip
WITHOUT_EFFECT = {"use_fast", "legacy", "trust_remote_code", "fix_mistral_regex"}


class Tokenizer(BatchTokenizer):
    """Encodes text and conversations into ids and decodes ids.

    Attributes, beside those of `TextTokenizer` and `BatchTokenizer`:
        version: the layout of conversations, one of `VERSIONS`; with another one text works, `encode_chat` does not.
        other_layout: a sign that the layout is not Mistral's, or "". `encode_chat` refuses if there is one.
        image_reader: from the source of an image to its pixels (3, height, width) and ids, for `apply_chat_template`;
            None: images are refused. `auto.AutoTokenizer` sets it for vision models.
        directory: where the tokenizer was read, or None.
    """

    def __init__(self, backend: Backend, version: str | None = None) -> None:
        super().__init__(backend, version)
        self.other_layout = ""
        self.image_reader: Callable[[Any], tuple[Tensor, list[int]]] | None = None
        self.directory: Path | None = None

    @classmethod
    def from_dir(
        cls: type[AnyTokenizer], directory: str | Path, version: str | None = None
    ) -> AnyTokenizer:
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

        tokenizer.directory = directory
        tokenizer.name_or_path = str(directory)
        if version is None:
            added = {token.content for token in tokenizer._added_tokens.values()}
            tokenizer.other_layout = sign_of_other_layout(directory, added)
        return tokenizer

    @classmethod
    def from_pretrained(
        cls: type[AnyTokenizer],
        pretrained_model_name_or_path: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        version: str | None = None,
        padding_side: str = "left",
        truncation_side: str = "right",
        model_max_length: int | float | None = None,
        pad_token: str | None = None,
        **without_effect: Any,
    ) -> AnyTokenizer:
        """Read the tokenizer of a model directory or of a Hub repository, without its weights.

        Args:
            revision, token, cache_dir, local_files_only: see `checkpoint.find`.
            version: see `from_dir`.
            padding_side, truncation_side, model_max_length, pad_token: the attributes of these names.
            without_effect: `WITHOUT_EFFECT`, arguments of Transformers that change nothing here: there is one kind of
                tokenizer, no code of a repository is run, and a wrong split expression is always repaired.

        Raises:
            FileNotFoundError, ValueError: as `checkpoint.find` and `from_dir`; an unknown argument.
        """
        unknown = sorted(without_effect.keys() - WITHOUT_EFFECT)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no argument of Tokenizer.from_pretrained")
        name = pretrained_model_name_or_path
        directory = checkpoint.find(name, revision, "tokenizer", token, cache_dir, local_files_only)
        tokenizer = cls.from_dir(directory, version)
        tokenizer.name_or_path = str(name)
        tokenizer.padding_side = expect_choice("padding_side", padding_side, SIDES)
        tokenizer.truncation_side = expect_choice("truncation_side", truncation_side, SIDES)
        tokenizer.model_max_length = model_max_length
        tokenizer._limit(None)  # raises ValueError
        if pad_token is not None:
            tokenizer.pad_token = pad_token
        return tokenizer

    def save_pretrained(self, save_directory: str | Path, **unsupported: Any) -> tuple[str, ...]:
        """Copy the files of the tokenizer into a directory, and remove those of another tokenizer there: all or none.
        Attributes that were changed (`pad_token`) are not saved. Returns the paths of the files.

        Raises:
            FileNotFoundError: the files that the tokenizer was read from are gone.
            ValueError: the tokenizer was not read from a directory, or an argument that is not supported.
        """
        refuse_unsupported(unsupported)
        if self.directory is None:
            cure = "write it with tokenizer.backend.save(path)"
            raise ValueError(f"the tokenizer was not read from files; {cure}")
        files = _tokenizer_files(self.directory)
        if not files:
            raise FileNotFoundError(f"{self.directory} does not hold the tokenizer any more; load it again")
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        writers = {target / path.name: partial(shutil.copyfile, path) for path in files}
        if target.resolve() != self.directory.resolve():
            # A tekken.json would be preferred to the tokenizer.json that is copied.
            others = [path for path in _tokenizer_files(target) if path not in writers]
            checkpoint.replace_files(writers, before=partial(_remove, others))
        return tuple(map(str, writers))

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

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> Any:
        """Encode a conversation or a list of them; Transformers' `apply_chat_template`. There is no template: the
        layout is that of `version`, see `encode_chat`.

        Args:
            conversation: messages, or a list of lists of messages.
            tools: see `encode_chat`. Python functions are not supported.
            add_generation_prompt: checked only. All layouts end where the answer begins.
            continue_final_message: the answer continues the last message, which is the assistant's.
            tokenize: with False, return text with special tokens, and one [IMG] for each image, which needs no source:
                {"type": "image"}. A user can forge that text. `encode` and `__call__` read it as plain text.
            padding, truncation, max_length, return_tensors: see `__call__`.
            return_dict: with False, return input_ids only.
            unsupported: not supported.

        Returns:
            input_ids and attention_mask, as `__call__`. With images also pixel_values, and image_sizes where the images
            have different sizes (`images.batch_images`).

        Raises:
            ValueError: as `encode_chat` and `__call__`; images without an `image_reader`.
        """
        refuse_unsupported(unsupported)
        conversations, batched = split_conversations(conversation)
        if tokenize:
            return self.chat_rows(
                conversations, tools, add_generation_prompt, continue_final_message, return_dict,
                batched=batched, padding=padding, truncation=truncation, max_length=max_length,
                return_tensors=return_tensors,
            )  # fmt: skip
        prepared = prepare(conversations, tools, add_generation_prompt, continue_final_message)
        texts = [self._chat_text(messages, tools) for messages in prepared]
        if batched:
            return texts
        return texts[0]

    def chat_rows(
        self,
        conversations: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        """The rows of ids of conversations, with their images: `apply_chat_template` with tokenize=True.

        Args:
            conversations: lists of messages.
            tools, add_generation_prompt, continue_final_message, return_dict: see `apply_chat_template`.
            settings: the keyword arguments of `batch_rows`.

        Raises:
            ValueError: as `apply_chat_template`.
        """
        prepared = prepare(conversations, tools, add_generation_prompt, continue_final_message)
        images: list[Tensor] = []

        def encode_image(source: Any) -> list[int]:
            if self.image_reader is None:
                cure = "load it with auto.AutoTokenizer.from_pretrained(a vision model's directory)"
                raise ValueError(f"this tokenizer reads no images; {cure}")
            pixels, ids = self.image_reader(source)
            images.append(pixels)
            return ids

        rows = [self.encode_chat(messages, tools, encode_image) for messages in prepared]
        batch = self.batch_rows(rows, images, **settings)
        if return_dict:
            return batch
        if images:
            raise ValueError("return_dict=False would lose the images; give return_dict=True")
        return batch["input_ids"]

    def batch_rows(
        self,
        rows: list[list[int]],
        images: Sequence[Tensor],
        *,
        batched: bool = True,
        every_size: bool = False,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **unsupported: Any,
    ) -> BatchEncoding:
        """Cut and pad rows of ids, and add their images.

        Args:
            images: (3, height, width) each, in the order of the rows.
            batched: with False, return the only row, see `first_row`.
            every_size: return image_sizes even if all images have the same size.
            padding, truncation, max_length, return_tensors: see `__call__`.

        Raises:
            ValueError: as `__call__`; truncation of a text with images.
        """
        refuse_unsupported(unsupported)
        cut = self.truncate(rows, truncation, max_length, padding)
        if images and cut != rows:
            raise ValueError("truncation would cut a text with images; allowed: a larger max_length, or none")
        batch = self.pad({"input_ids": cut}, padding, max_length, return_tensors=return_tensors)
        if not batched:
            batch = first_row(batch)
        if images:
            format = expect_choice("return_tensors", return_tensors, TENSORS)
            batch.update(image_inputs(images, format, every_size))
        return batch

    def _chat_text(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
        """The text of a conversation, with one [IMG] for each image.

        Raises:
            ValueError: as `encode_chat`; an image, for a tokenizer without [IMG].
        """

        def encode_image(source: Any) -> list[int]:
            if "[IMG]" not in self.special_tokens:
                raise ValueError("an image, for a tokenizer without the special token [IMG]")
            return [self.special_tokens["[IMG]"]]

        ids = self.encode_chat(with_image_sources(messages), tools, encode_image)
        return str(self.decode(ids, skip_special_tokens=False))

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


def _tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer in a directory (see `TOKENIZER_FILES`)."""
    paths = [path for pattern in TOKENIZER_FILES for path in sorted(directory.glob(pattern))]
    return [path for path in paths if path.is_file()]


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def prepare(
    conversations: Sequence[Any], tools: Any, add_generation_prompt: bool, continue_final_message: bool
) -> list[Any]:
    """Check arguments of `apply_chat_template`, and mark the last messages if they are continued (raises ValueError as
    `check_tools` and `mark_prefix`)."""
    check_tools(tools)
    if not continue_final_message:
        return list(conversations)
    return [mark_prefix(messages, add_generation_prompt) for messages in conversations]


def check_tools(tools: Any) -> None:
    """Raise ValueError if a tool is a Python function."""
    if isinstance(tools, (list, tuple)):
        for tool in tools:
            if callable(tool):
                supported = "type function, function: {name, description, parameters: JSON schema}"
                raise ValueError(f"a tool is a Python function ({brief(tool)}); supported: {supported}")


def mark_prefix(messages: Any, add_generation_prompt: bool) -> list[Any]:
    """The messages, the last one marked as continued by the answer (`prefix`).

    Raises:
        ValueError: it is not the assistant's, or a new message is asked for, too.
    """
    if add_generation_prompt:
        raise ValueError("add_generation_prompt and continue_final_message are both on; allowed: one of them")
    last = None
    if isinstance(messages, (list, tuple)) and messages:
        last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        allowed = "a last message of role assistant"
        raise ValueError(f"continue_final_message needs {allowed}; found {brief(last)}")
    return [*messages[:-1], {**last, "prefix": True}]
