"""Texts and images to the input of a vision model, under the names of Transformers' `PixtralProcessor`.

    processor = Processor.from_pretrained("mistralai/Ministral-3-3B-Instruct-2512")
    inputs = processor(images="photo.jpg", text="<s>[INST][IMG]What is shown here?[/INST]")
    model.generate(**inputs)

The text of `processor(...)` is a whole prompt: special tokens in it ARE special tokens. Never put the text of a user
into it. `apply_chat_template` is the safe way from messages to ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

import checkpoint
from checkpoint.files import CONFIG, PARAMS, has_any
from checks import as_list, brief
from images import read_image
from tokenizer import BatchEncoding, Tokenizer
from tokenizer.batches import TENSORS, expect_choice, split_conversations
from tokenizer.tokens import list_of_texts, refuse_unsupported
from vision_config import Mistral3Config


class MistralCommonBackend(Tokenizer):
    """The tokenizer with the default of Transformers' class of this name: `decode` shows special tokens. Loaded from a
    vision model's directory, it also reads images in messages."""

    skip_special_tokens = False

    @classmethod
    def from_dir(cls, directory: str | Path, version: str | None = None) -> MistralCommonBackend:
        """See `Tokenizer.from_dir`. For a vision model, the image sizes come from config.json."""
        tokenizer = super().from_dir(directory, version)
        config = read_vision_config(Path(directory))
        if config is not None:
            tokenizer.image_reader = partial(read_image, config=config, tokenizer=tokenizer)
        return tokenizer


def read_vision_config(directory: Path) -> Mistral3Config | None:
    """The configuration of a vision model; None for another model, or a directory without a configuration."""
    if not has_any(directory, CONFIG, PARAMS):
        return None
    content = checkpoint.read_config(directory)
    if content.get("model_type") != Mistral3Config.model_type:
        return None
    return Mistral3Config.from_dict(content)


class Processor:
    """A tokenizer that reads images.

    Attributes:
        tokenizer: with its `image_reader`.
        image_token, image_token_id: "[IMG]" and its id.

    Raises:
        ValueError: the tokenizer reads no images.
    """

    image_token = "[IMG]"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if getattr(tokenizer, "image_reader", None) is None:
            cure = "use AutoTokenizer for a text model, or give a vision model (model_type 'mistral3')"
            raise ValueError(f"a processor needs a tokenizer that reads images; {cure}")
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.special_tokens.get(self.image_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Processor:
        """Read the processor of a vision model; arguments and errors are those of `Tokenizer.from_pretrained`."""
        return cls(MistralCommonBackend.from_pretrained(pretrained_model_name_or_path, **arguments))

    def save_pretrained(self, save_directory: str | Path, **unsupported: Any) -> tuple[str, ...]:
        """See `Tokenizer.save_pretrained`. The sizes of images are in config.json, which the model saves."""
        return self.tokenizer.save_pretrained(save_directory, **unsupported)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = "pt",
        **unsupported: Any,
    ) -> BatchEncoding:
        """Encode prompts with images. SPECIAL TOKENS IN THE TEXT ARE READ AS SUCH, see above.

        Args:
            images: an image, a list of images, or a list of lists, one for each text (see `images.load_image`).
            text: a prompt or a list of prompts, with one [IMG] for each image.
            add_special_tokens: begin with "<s>" where the text does not. (Transformers writes a second one.)
            padding, truncation, max_length, return_tensors: see `Tokenizer.__call__`.
            unsupported: not supported.

        Returns:
            input_ids and attention_mask (B, T); with images pixel_values (N, 3, height, width) and image_sizes (N, 2).

        Raises:
            ValueError: another number of [IMG] than of images, an image that cannot be read, or as
                `Tokenizer.__call__`.
            FileNotFoundError: as `images.load_image`.
        """
        refuse_unsupported(unsupported)
        if text is None:
            raise ValueError("text is missing; give a prompt with one [IMG] for each image")
        texts = list_of_texts(text)
        sources = images_of_texts(images, [item.count(self.image_token) for item in texts])
        pixels: list[Tensor] = []
        rows = []
        for item, own_sources in zip(texts, sources):
            encoded = [self.tokenizer.image_reader(source) for source in own_sources]  # type: ignore[misc]
            pixels += [image for image, _ in encoded]
            rows.append(self._encode(item, add_special_tokens, iter([ids for _, ids in encoded])))
        return self.tokenizer.batch_rows(
            rows, pixels, every_size=True, padding=padding, truncation=truncation, max_length=max_length,
            return_tensors=return_tensors,
        )  # fmt: skip

    def _encode(self, text: str, add_special_tokens: bool, images: Iterator[list[int]]) -> list[int]:
        """The ids of a prompt, in which each [IMG] becomes the ids of the next image."""
        bos = add_special_tokens and not text.startswith(str(self.tokenizer.bos_token))
        row = []
        for i in self.tokenizer.encode(text, bos, split_special_tokens=False):
            if i == self.image_token_id:
                row += next(images)
            else:
                row.append(i)
        return row

    def apply_chat_template(
        self, conversation: Sequence[Any], tokenize: bool = False, return_dict: bool = False,
        return_tensors: str | None = "pt", processor_kwargs: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:  # fmt: skip
        """`Tokenizer.apply_chat_template` with the defaults of Transformers' processors: text, unless `tokenize` is on,
        and `image_sizes` with all images. One conversation gives tensors with B = 1.

        Args:
            arguments, processor_kwargs: the others of `Tokenizer.apply_chat_template`.
        """
        if processor_kwargs is not None:
            arguments = {**arguments, **processor_kwargs}
            return_tensors = arguments.pop("return_tensors", return_tensors)
        expect_choice("return_tensors", return_tensors, TENSORS)
        if not tokenize:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, **arguments)
        conversations, _ = split_conversations(conversation)
        # `batched` also for one conversation: its tensors have B = 1.
        return self.tokenizer.chat_rows(
            conversations, return_dict=return_dict, batched=True, every_size=True,
            return_tensors=return_tensors, **arguments,
        )  # fmt: skip

    def decode(self, *arguments: Any, **settings: Any) -> Any:
        """See `Tokenizer.decode`."""
        return self.tokenizer.decode(*arguments, **settings)

    def batch_decode(self, *arguments: Any, **settings: Any) -> list[str]:
        """See `Tokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*arguments, **settings)

    def pad(self, *arguments: Any, **settings: Any) -> BatchEncoding:
        """See `Tokenizer.pad`."""
        return self.tokenizer.pad(*arguments, **settings)


def images_of_texts(images: Any, counts: list[int]) -> list[list[Any]]:
    """The images of each text, which has `counts` [IMG].

    Raises:
        ValueError: other numbers of images.
    """
    images = as_list(images)
    if any(isinstance(image, (list, tuple)) for image in images):
        rows = [as_list(row) for row in images]
    else:
        rest = iter(images)
        rows = [list(islice(rest, count)) for count in counts]
        rows[-1] += rest  # too many
    found = [len(row) for row in rows]
    if found != counts:
        conflict = f"the texts have {brief(counts)} [IMG] and {brief(found)} images"
        raise ValueError(f"{conflict}; allowed: equal numbers")
    return rows
