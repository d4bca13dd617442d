"""Batches of texts under the names of Transformers' tokenizers: rows of ids are cut, padded and made tensors.

    tokenizer(texts, padding=True, return_tensors="pt")     # input_ids and attention_mask (B, T)
    tokenizer.batch_decode(rows)                            # texts

Nothing here encodes text: that is `TextTokenizer.encode`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checks import brief, expect_size, is_number
from images import batch_images

from .objects import check_text
from .tokens import TokenNames, list_of_texts, refuse_unsupported, to_lists

PADDING: dict[Any, str] = {False: "", "do_not_pad": "", True: "longest", "longest": "longest",
                           "max_length": "max_length"}  # fmt: skip
TRUNCATION: dict[Any, bool] = {False: False, "do_not_truncate": False, True: True, "longest_first": True}
SIDES = {"left": "left", "right": "right"}
TENSORS: dict[Any, str] = {None: "", "pt": "pt", "np": "np"}
# The number that fills up a shorter row of these keys. That of input_ids is the tokenizer's `pad_token_id`.
FILLERS = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
# From this `model_max_length` on there is no limit; Transformers writes 1e30.
NO_LIMIT = 1e20


class BatchEncoding(dict[str, Any]):
    """A dictionary whose values are also attributes: `input_ids`, `attention_mask` (1 at text, 0 at padding), and with
    images `pixel_values` and `image_sizes`. `model.generate(**encoding)` takes it."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the encoding has no {name!r}; it has {', '.join(self)}")

    @property
    def data(self) -> BatchEncoding:
        """The encoding itself."""
        return self

    def copy(self) -> BatchEncoding:
        """A new encoding of the same values."""
        return BatchEncoding(self)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> BatchEncoding:
        """Move all tensors to a device. With `dtype`, tensors of floats (images) are converted. Returns itself."""
        if isinstance(device, torch.dtype):
            dtype = device
            device = None
        for name, value in self.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                self[name] = value.to(device=device, dtype=dtype)
            elif isinstance(value, Tensor):
                self[name] = value.to(device=device)
        return self


class BatchTokenizer(TokenNames):
    """The methods of a `TextTokenizer` that Transformers' tokenizers have, too. Arguments have their meaning there.
    Those in `tokens.UNSUPPORTED` are refused, unless their value asks for nothing.

    Attributes:
        padding_side: "left" (so that every prompt ends where its answer begins), or "right".
        truncation_side: the side on which long texts are cut, "right" or "left".
        model_max_length: the number of ids to which texts are cut without a `max_length`; None, or a number from 1e20
            on: no limit.
        skip_special_tokens: whether `decode` leaves special tokens out, where its argument does not say.
    """

    padding_side = "left"
    truncation_side = "right"
    model_max_length: int | float | None = None
    skip_special_tokens = True

    # Text to ids.

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        split_special_tokens: bool = True,
        **unsupported: Any,
    ) -> BatchEncoding:
        """Encode a text or a list of texts.

        Args:
            text: a text, or a list of at least one.
            add_special_tokens: begin with "<s>".
            padding: True or "longest": to the longest row. "max_length": to `max_length`. False: none.
            truncation: True or "longest_first": cut to `max_length` ids, "<s>" included; to `model_max_length` without.
                None is True with a `max_length` and padding=False.
            max_length: the number of ids to which rows are cut or padded, as the two arguments above say.
            pad_to_multiple_of: padded rows get a length that is a multiple of this number.
            padding_side: "left" or "right"; None is the attribute of this name.
            return_tensors: "pt" (PyTorch), "np" (NumPy), None for lists.
            return_attention_mask: with False, return input_ids only. None is True.
            split_special_tokens: see `encode`. Here the default is True: special tokens that users type stay text.
            text_pair, return_token_type_ids, unsupported: not supported.

        Returns:
            input_ids and attention_mask: lists of ids for one text, lists of lists or tensors (B, T) for several. One
            text with `return_tensors` gives B = 1.

        Raises:
            ValueError: an argument with another value, padding without a pad token, or tensors of unequal rows.
        """
        if text_pair is not None or return_token_type_ids:
            problem = "text_pair and return_token_type_ids are not supported"
            raise ValueError(f"{problem}; give one text for each row")
        refuse_unsupported(unsupported)
        texts = list_of_texts(text)
        rows = [self.encode(item, add_special_tokens, split_special_tokens) for item in texts]
        has_bos = add_special_tokens and self.bos_token_id is not None
        rows = self.truncate(rows, truncation, max_length, padding, int(has_bos))
        batch = self.pad(
            {"input_ids": rows}, padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask,
            return_tensors,
        )  # fmt: skip
        if isinstance(text, str):
            return first_row(batch)
        return batch

    def encode(
        self, text: str, bos: bool = True, split_special_tokens: bool = True, **settings: Any
    ) -> Any:  # fmt: skip
        """Ids of a text, see `TextTokenizer.encode`.

        Args:
            settings: other arguments of `__call__`, of which these are the `input_ids`.

        Raises:
            ValueError: not a text; as `__call__`; `bos` and `add_special_tokens` that differ.
        """
        if not isinstance(bos, bool):
            supported = "True and False, and no text_pair"
            raise ValueError(f"bos={brief(bos)} is not supported; supported: {supported}")
        if not settings:
            return super().encode(text, bos, split_special_tokens)
        if settings.setdefault("add_special_tokens", bos) and not bos:
            raise ValueError("bos=False and add_special_tokens=True differ; give one of the two")
        check_text(text, "text")
        return self(text, split_special_tokens=split_special_tokens, **settings)["input_ids"]

    def truncate(
        self, rows: list[list[int]], truncation: Any, max_length: int | None, padding: Any,
        leading_ids: int = 0,
    ) -> list[list[int]]:  # fmt: skip
        """Cut rows of ids on `truncation_side`.

        Args:
            truncation, max_length, padding: see `__call__`.
            leading_ids: the number of ids at the beginning of a row that are kept.

        Raises:
            ValueError: an argument, or the attribute `truncation_side`, with another value.
        """
        padded = expect_choice("padding", padding, PADDING)
        if truncation is None:
            truncation = max_length is not None and padding is False
        cut = expect_choice("truncation", truncation, TRUNCATION)
        limit = self._limit(max_length)
        if max_length is not None and not cut and padded != "max_length":
            cure = "truncation=True cuts to it, padding='max_length' pads to it"
            warnings.warn(f"max_length={max_length} has no effect here; {cure}", stacklevel=3)
        if not cut or limit is None:
            return rows
        if expect_choice("truncation_side", self.truncation_side, SIDES) == "right":
            return [row[:limit] for row in rows]
        leading_ids = min(leading_ids, limit)
        cut_rows = []
        for row in rows:
            surplus = max(0, len(row) - limit)
            cut_rows.append(row[:leading_ids] + row[leading_ids + surplus :])
        return cut_rows

    def _limit(self, max_length: int | None) -> int | None:
        """The largest number of ids in a row: `max_length`, else `model_max_length`; None without a limit.

        Raises:
            ValueError: neither a whole number above 0 nor None.
        """
        expect_size("max_length", max_length)
        if max_length is not None:
            return max_length
        limit: Any = self.model_max_length
        if is_number(limit, float, NO_LIMIT):
            return None
        expect_size("model_max_length", limit)
        return limit

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        **unsupported: Any,
    ) -> BatchEncoding:
        """Fill up rows of ids to one length, with `pad_token_id`, and their masks with 0.

        Args:
            encoded_inputs: {"input_ids": rows} or a list of {"input_ids": row}, as a tokenizer returns it. The values
                are lists, arrays or tensors. Keys that are not a tokenizer's (labels) are not filled up.
            padding, max_length, pad_to_multiple_of, padding_side: see `__call__`.
            return_attention_mask: with False, add no attention_mask. One that is there stays.
            return_tensors: as in `__call__`; None keeps arrays and tensors what they are.

        Returns:
            The encoding, as `__call__` returns it. One row gives one row.

        Raises:
            ValueError: as `__call__`; `encoded_inputs` without input_ids, or of different keys; ids that are no whole
                numbers; a mask of another length than its ids; a value that is no tensor.
        """
        refuse_unsupported(unsupported)
        inputs = as_columns(encoded_inputs)
        format = expect_choice("return_tensors", return_tensors, TENSORS)
        if not format:
            format = tensor_format(inputs["input_ids"])
        columns = {name: to_lists(value) for name, value in inputs.items()}
        rows = columns["input_ids"]
        single = isinstance(rows, list) and len(rows) > 0 and not isinstance(rows[0], list)
        if single:
            columns = {name: [value] for name, value in columns.items()}
            rows = columns["input_ids"]
        expect_rows(columns)
        if return_attention_mask is not False:
            columns.setdefault("attention_mask", [[1] * len(row) for row in rows])

        length = self._padded_length(rows, padding, max_length, pad_to_multiple_of)
        if padding_side is None:
            padding_side = self.padding_side
        side = expect_choice("padding_side", padding_side, SIDES)
        fillers = {"input_ids": self.pad_token_id, **FILLERS}
        for name in columns.keys() & fillers.keys():
            columns[name] = [fill_up(row, length, fillers[name], side) for row in columns[name]]
        batch = BatchEncoding(columns)
        if single:
            batch = first_row(batch)
        return as_tensors(batch, format)

    def _padded_length(
        self, rows: list[list[int]], padding: Any, max_length: int | None, multiple: int | None
    ) -> int:
        """The number of ids to which rows are padded; 0 without padding.

        Raises:
            ValueError: an argument with another value, no pad token, or "max_length" without a length.
        """
        expect_size("pad_to_multiple_of", multiple)
        max_length = self._limit(max_length)
        padding = expect_choice("padding", padding, PADDING)
        if not padding:
            if multiple is not None:
                warnings.warn("pad_to_multiple_of has no effect without padding=True", stacklevel=4)
            return 0
        if self.pad_token_id is None:
            cure = "set tokenizer.pad_token = tokenizer.eos_token"
            raise ValueError(f"the tokenizer has no padding token; {cure}")
        length = max(map(len, rows), default=0)
        if padding == "max_length":
            if max_length is None:
                cure = "or give padding=True, the longest row"
                raise ValueError(f"padding='max_length' needs a max_length; {cure}")
            length = max_length
        if multiple is not None:
            length += -length % multiple
        return length

    # Ids to text.

    def decode(  # type: ignore[override]  # of rows, too
        self, token_ids: Any, skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None, **unsupported: Any,
    ) -> Any:  # fmt: skip
        """Text of ids: a list, an array or a tensor of them, or one id. Bytes that are no UTF-8 become U+FFFD. Rows of
        ids give a list of texts.

        Args:
            skip_special_tokens: leave special tokens out; None is the attribute of this name.
            clean_up_tokenization_spaces: None or False. Another value is not supported.
            unsupported: not supported.

        Raises:
            ValueError: no such id, or not ids.
        """
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces=True is not supported; it would change the text")
        refuse_unsupported(unsupported)
        if skip_special_tokens is None:
            skip_special_tokens = self.skip_special_tokens
        ids = to_lists(token_ids)
        if isinstance(ids, Iterable) and not isinstance(ids, str):
            ids = list(ids)
        else:
            ids = [ids]
        if ids and isinstance(ids[0], list):
            rows = [expect_list("a row of ids", row) for row in ids]
            return [super(BatchTokenizer, self).decode(row, skip_special_tokens) for row in rows]
        return super().decode(ids, skip_special_tokens)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None, **unsupported: Any,
    ) -> list[str]:  # fmt: skip
        """The texts of rows of ids, see `decode`. One row of ids gives one text.

        Raises:
            ValueError: as `decode`; `sequences` that are not rows.
        """
        rows = to_lists(sequences)
        if not isinstance(rows, list):
            raise ValueError(f"sequences are {brief(sequences)}; allowed: rows of ids")
        if rows and not isinstance(rows[0], list):
            rows = [rows]
        settings = {"clean_up_tokenization_spaces": clean_up_tokenization_spaces, **unsupported}
        return [self.decode(row, skip_special_tokens, **settings) for row in rows]

# ---------------------------------------------------------------------------------------------------- arguments


def expect_choice(name: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    """The meaning of a value among `choices` (raises ValueError for another one)."""
    for choice, meaning in choices.items():
        if value is choice or (isinstance(value, str) and value == choice):
            return meaning
    allowed = ", ".join(map(repr, choices))
    raise ValueError(f"{name}={brief(value)} is not supported; supported: {allowed}")


def expect_list(what: str, value: Any) -> list[Any]:
    """The value, which must be a list (raises ValueError for another one)."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is {brief(value)}; allowed: a list of whole numbers")
    return value


def expect_rows(columns: Mapping[str, Any]) -> None:
    """Raise ValueError unless input_ids are rows of whole numbers, and those of `FILLERS` are rows of as many."""
    lengths = None
    for name in ("input_ids", *(columns.keys() & FILLERS.keys())):
        found = []
        for row in expect_list(name, columns[name]):
            kinds = {type(value) for value in expect_list(f"a row of {name}", row)}  # faster than each value
            if not all(issubclass(kind, Integral) for kind in kinds):
                raise ValueError(f"a row of {name} is {brief(row)}; allowed: whole numbers")
            found.append(len(row))
        if lengths is None:
            lengths = found
        if found != lengths:
            conflict = f"rows of {name} have lengths {brief(found)}, those of input_ids {brief(lengths)}"
            raise ValueError(f"{conflict}; allowed: equal lengths")


def split_conversations(conversation: Any) -> tuple[list[Any], bool]:
    """The conversations in one or in a list of them, and whether it is a list of them."""
    first = None
    if isinstance(conversation, (list, tuple)) and conversation:
        first = conversation[0]
    if isinstance(first, (list, tuple)):
        return list(conversation), True
    return [conversation], False


# --------------------------------------------------------------------------------------------- lists and tensors


def tensor_format(value: Any) -> str:
    """The format of a value, or of the first one in a list: "pt" (tensor), "np" (array), or "" (lists)."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, Tensor):
        return "pt"
    if isinstance(value, np.ndarray):
        return "np"
    return ""


def as_columns(encoded: Any) -> dict[str, Any]:
    """A list of encodings as one encoding of lists (raises ValueError where input_ids are missing)."""
    if isinstance(encoded, (list, tuple)) and encoded and all(isinstance(row, Mapping) for row in encoded):
        for row in encoded:
            if row.keys() != encoded[0].keys():
                conflict = f"encodings have keys {list(encoded[0])} and {list(row)}"
                raise ValueError(f"{conflict}; allowed: the same in all")
        encoded = {name: [row[name] for row in encoded] for name in encoded[0]}
    rows = None
    if isinstance(encoded, Mapping):
        rows = encoded.get("input_ids")
    if not isinstance(rows, (list, tuple, Tensor, np.ndarray)):
        allowed = "an encoding with input_ids, or a list of such"
        raise ValueError(f"the encoded inputs are {brief(encoded)}; allowed: {allowed}")
    return dict(encoded)


def fill_up(row: list[Any], length: int, filler: Any, side: str) -> list[Any]:
    """A row with `filler` on one side, up to a length."""
    filling = [filler] * max(0, length - len(row))
    if side == "left":
        return filling + row
    return row + filling


def first_row(batch: BatchEncoding) -> BatchEncoding:
    """The encoding of the only row: lists lose the dimension of rows, tensors keep it."""
    row = BatchEncoding(batch)
    for name, value in batch.items():
        if isinstance(value, list):
            row[name] = value[0]
    return row


def as_tensors(batch: BatchEncoding, format: str) -> BatchEncoding:
    """Convert the values of an encoding to tensors of a format, see `TENSORS` (raises ValueError for unequal rows, or
    for values that are no numbers)."""
    if not format:
        return batch
    for name, value in batch.items():
        of_text = name in ("input_ids", *FILLERS)
        if of_text and len({len(row) for row in value if isinstance(row, list)}) > 1:
            lengths = brief([len(row) for row in value])
            cure = "a tensor needs equal ones: give padding=True"
            raise ValueError(f"rows of {name} have lengths {lengths}; {cure}")
        try:
            tensor = torch.tensor(value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} is {brief(value)}, which is no tensor; leave it out") from error
        if of_text:
            tensor = tensor.long()  # an empty row is read as floats
        batch[name] = to_format(tensor, format)
    return batch


def image_inputs(images: Sequence[Tensor], format: str, every_size: bool = False) -> dict[str, Any]:
    """pixel_values of images (3, h, w), and image_sizes where they differ, or always if `every_size`.

    Tensors of a format (see `TENSORS`) are those of `batch_images`. Without a format they are lists, and the images
    keep their sizes.
    """
    pixel_values, sizes = batch_images(images)
    inputs: dict[str, Any] = {"pixel_values": [image.numpy() for image in images]}
    image_sizes: Any = sizes
    if format:
        inputs["pixel_values"] = to_format(pixel_values, format)
        image_sizes = to_format(torch.tensor(sizes), format)
    if every_size or len(set(sizes)) > 1:
        inputs["image_sizes"] = image_sizes
    return inputs


def to_format(tensor: Tensor, format: str) -> Any:
    """The tensor for "pt", the array for "np"."""
    if format == "np":
        return tensor.numpy()
    return tensor
