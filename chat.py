"""A conversation with a model, whose cache is kept between answers, and its messages.

    conversation = Conversation(tokenizer, model.config, [{"role": "user", "content": "Who are you?"}])
    message = conversation.answer(model, max_new_tokens=200)

`terminal.py` holds the conversation in the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from generate import generate
from images import batch_images, read_image
from ministral import KVCache
from model_types import GenerativeModel
from tokenizer import Tokenizer, content_with_thinking
from vision import ImageSizes
from vision_config import Mistral3Config

# ------------------------------------------------------------------------------------------------------ images


def batch_or_none(images: Sequence[Tensor]) -> tuple[Tensor | None, ImageSizes | None]:
    """pixel_values and image_sizes for `generate`; None without images."""
    if not images:
        return None, None
    return batch_images(images)


# ------------------------------------------------------------------------------------------------ conversations


class Conversation:
    """Messages (see `Tokenizer.encode_chat`), and the KV cache of their beginning, which is kept between answers: only
    new tokens are read (unless a sliding window has moved on and the beginning has changed).

    Attributes:
        messages: may be changed between answers; the cache is cut back to the beginning that is still the same.
        tools: see `Tokenizer.encode_chat`.
        images: source -> (pixels, ids) of the images from files and addresses; each is read once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: Any,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.messages = list(messages)
        self.tools = tools
        self.images: dict[str, tuple[Tensor, list[int]]] = {}
        self._cache: KVCache | None = None
        self._cached_ids: list[int] = []  # the ids whose keys are in the cache
        self._cached_images: list[Tensor] = []  # the images among them

    def read_image(self, source: Any) -> tuple[Tensor, list[int]]:
        """See `images.read_image`."""
        if not isinstance(self.config, Mistral3Config):
            conflict = f"an image, for a text model (model_type {self.config.model_type!r})"
            raise ValueError(f"{conflict}; give a vision model (model_type 'mistral3')")
        if not isinstance(source, str):
            return read_image(source, self.config, self.tokenizer)
        if source not in self.images:
            self.images[source] = read_image(source, self.config, self.tokenizer)
        return self.images[source]

    def encode(self) -> tuple[list[int], list[Tensor]]:
        """The ids of the conversation up to where the answer begins, and its images (raises as `encode_chat` and
        `read_image`)."""
        images: list[Tensor] = []

        def encode_image(source: Any) -> list[int]:
            pixels, ids = self.read_image(source)
            images.append(pixels)
            return ids

        return self.tokenizer.encode_chat(self.messages, self.tools, encode_image), images

    def answer(self, model: GenerativeModel, **settings: Any) -> dict[str, Any]:
        """Let the model answer, and append the answer, as `Tokenizer.decode_chat` gives it, to the messages. A message
        with "prefix" becomes the beginning of it; an empty answer is not appended.

        Args:
            settings: those of `generate`. `return_dict_in_generate` has no effect: the result is the message.
        """
        ids, images = self.encode()
        cache, cached = self._reuse_cache(ids, images)
        pixel_values, image_sizes = batch_or_none(images[cached:])
        settings["return_dict_in_generate"] = False
        rows = generate(model, torch.tensor([ids]), pixel_values=pixel_values, image_sizes=image_sizes,
                        past_key_values=cache, **settings)  # fmt: skip
        tokens = rows[0].tolist()
        self._cache = cache
        self._cached_ids = tokens[: cache.get_seq_length()]
        self._cached_images = images

        message = self.tokenizer.decode_chat(tokens[len(ids) :], self.first_kind())
        if self.messages[-1].get("prefix"):
            message = join_messages(self.messages.pop(), message)
        if message["content"] or message.get("tool_calls") or message.get("malformed_calls"):
            self.messages.append(dict(message))
        return message

    def first_kind(self) -> str:
        """The kind of text that the answer begins with: "thinking" if the last message is a prefix that ends in it."""
        last = self.messages[-1]
        parts = last.get("content")
        if not last.get("prefix") or not isinstance(parts, (list, tuple)) or not parts:
            return "text"
        if parts[-1].get("type") == "thinking" and not parts[-1].get("closed", True):
            return "thinking"
        return "text"

    def _reuse_cache(self, ids: list[int], images: list[Tensor]) -> tuple[KVCache, int]:
        """The cache, cut back to the ids that `ids` and the cached ids have in common, and the number of images in
        it."""
        cache, self._cache = self._cache, None  # set again after the answer
        if cache is None:
            return KVCache(self.config), 0
        common = 0
        limit = min(len(ids) - 1, len(self._cached_ids))  # the last id has to be read
        while common < limit and ids[common] == self._cached_ids[common]:
            common += 1

        # Equal ids may stand for another image. An image is reused as a whole.
        cached = 0
        for start, end in self._image_spans(ids, len(images)):
            if end > common or not self._is_cached(cached, images[cached]):
                common = min(common, start)
                break
            cached += 1
        try:
            cache.crop(common)
        except ValueError:  # a window has moved on
            return KVCache(self.config), 0
        return cache, cached

    def _image_spans(self, ids: list[int], count: int) -> list[tuple[int, int]]:
        """The place of each of `count` images in the ids: its first token, and the one after its last."""
        names = self.tokenizer.special_tokens
        image_ids = {names.get(name) for name in ("[IMG]", "[IMG_BREAK]", "[IMG_END]")}
        spans = []
        place = 0
        for _ in range(count):
            while ids[place] not in image_ids:
                place += 1
            end = ids.index(names["[IMG_END]"], place) + 1
            spans.append((place, end))
            place = end
        return spans

    def _is_cached(self, number: int, image: Tensor) -> bool:
        if number >= len(self._cached_images):
            return False
        cached = self._cached_images[number]
        return cached is image or torch.equal(cached, image)


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    config: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Tensor, Tensor | None, ImageSizes | None]:
    """A conversation, with images from files, web addresses or `data:` URIs, as `generate` takes it: input_ids (1, T),
    pixel_values and image_sizes (None without images). Raises as `Conversation.encode`."""
    ids, images = Conversation(tokenizer, config, messages, tools).encode()
    pixel_values, image_sizes = batch_or_none(images)
    return torch.tensor([ids]), pixel_values, image_sizes


# ----------------------------------------------------------------------------------------------------- messages


def join_messages(prefix: Mapping[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The message that begins with the message `prefix` and goes on with `answer`."""
    message = answer | {"content": join_content(content_with_thinking(prefix), answer["content"])}
    for key in ("tool_calls", "malformed_calls"):
        calls: list[Any] = []
        for part in (prefix, answer):
            if part.get(key):
                calls += part[key]
        if calls:
            message[key] = calls
    return message


def join_content(prefix: Any, rest: Any) -> Any:
    """The content of a message from the content of its prefix and the content that the model added."""
    if isinstance(prefix, str) and isinstance(rest, str):
        return prefix + rest
    first, second = as_parts(prefix), as_parts(rest)
    if not first or not second:
        return first + second
    left, right = first[-1], second[0]
    if left["type"] == right["type"] == "thinking" and not left.get("closed", True):
        thinking = left["thinking"]
        if not isinstance(thinking, str):
            thinking = "".join(part["text"] for part in thinking)
        first.pop()
        second[0] = right | {"thinking": thinking + right["thinking"]}
    elif left["type"] == right["type"] == "text":  # two parts would have a line break between them
        first.pop()
        second[0] = {"type": "text", "text": left["text"] + right["text"]}
    return first + second


def as_parts(content: Any) -> list[Any]:
    """The content of a message, a text or a list of parts or None, as a list of parts."""
    if not content:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content)


def awaits_user(messages: Sequence[Any]) -> bool:
    """Whether the next message is the user's, or that of a tool."""
    last: Mapping[str, Any] = {}
    if messages and isinstance(messages[-1], dict):
        last = messages[-1]
    if last.get("role") == "tool":
        return bool(open_calls(messages))
    return last.get("role") != "user" and not last.get("prefix")


def open_calls(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The tool calls of the last answer that have no result yet; [] if one of them is not a call."""
    results = 0
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == "tool":
            results += 1
            continue
        calls = None
        if isinstance(message, dict):
            calls = message.get("tool_calls")
        if not isinstance(calls, list) or not all(map(is_call, calls)):
            return []
        return calls[results:]
    return []


def is_call(call: Any) -> bool:
    """Whether that is a tool call."""
    return isinstance(call, dict) and isinstance(call.get("function"), dict)


def take_back(messages: list[Any]) -> None:
    """Remove the messages at the end that have no answer, and calls without results."""
    while messages and (not awaits_user(messages) or open_calls(messages)):
        messages.pop()
