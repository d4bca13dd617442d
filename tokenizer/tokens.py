"""The tokens of a vocabulary under the names of Transformers' tokenizers, and the arguments that are not supported."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from checks import brief, refuse_argument

from .bpe import TextTokenizer
from .objects import check_text

# Arguments of Transformers' tokenizers and processors that are not supported, each with a number that asks for nothing
# (None and False never do).
UNSUPPORTED = {
    "audio": None, "chat_template": None, "common_kwargs": None, "documents": None, "enable_thinking": None,
    "filename_prefix": None, "images_kwargs": None, "is_split_into_words": None, "legacy_format": None,
    "load_audio_from_video": None, "pair": None, "push_to_hub": None, "reasoning_effort": None,
    "return_assistant_tokens_mask": None, "return_length": None, "return_offsets_mapping": None,
    "return_overflowing_tokens": None, "return_special_tokens_mask": None, "sanitize_control_tokens": None,
    "spaces_between_special_tokens": None, "stride": 0, "text_kwargs": None, "text_pair": None,
    "text_pair_target": None, "text_target": None, "tokenizer_kwargs": None, "use_source_tokenizer": None,
    "videos": None,
}  # fmt: skip
CURE = "docs/transformers.md lists the supported arguments"


def refuse_unsupported(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that is not supported, unless its value asks for nothing. `verbose` only asks
    for warnings, and is ignored."""
    for name, value in arguments.items():
        if name == "verbose":
            continue
        if name not in UNSUPPORTED:
            raise ValueError(f"{name}={brief(value)} is no argument here; {CURE}")
        refuse_argument(name, value, CURE, UNSUPPORTED[name])


class TokenNames(TextTokenizer):
    """The tokens of a `TextTokenizer`. Names have their meaning in Transformers.

    Attributes:
        is_fast: True: the `tokenizers` library encodes text.
        name_or_path: the directory or Hub id that the tokenizer was read from, or "".
    """

    is_fast = True
    name_or_path = ""

    def __len__(self) -> int:
        return self.vocab_size

    # Tokens and ids.

    def get_vocab(self) -> dict[str, int]:
        """All tokens with their ids. Tokens of the vocabulary are in the byte alphabet (`bpe.LETTERS`)."""
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """See `get_vocab`."""
        return self.get_vocab()

    def tokenize(self, text: str, add_special_tokens: bool = False, **unsupported: Any) -> list[str]:
        """The tokens of a text, without "<s>" unless `add_special_tokens` is on.

        Raises:
            ValueError: not a text, or an argument that is not supported.
        """
        refuse_unsupported(unsupported)
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens))

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> Any:
        """The id of a token, or the ids of a list of tokens. An unknown token has the id of "<unk>", or None without
        one."""
        if isinstance(tokens, (list, tuple)) and not tokens:
            return []
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in list_of_texts(tokens)]
        found = self._find(tokens)
        if found is None:
            return self.unk_token_id
        return found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of a list of ids (raises ValueError if there is no such id)."""
        values = to_lists(ids)
        if not isinstance(values, list):
            return self._token(values)
        special = set()
        if skip_special_tokens:
            special = set(self.all_special_ids)
        return [self._token(i) for i in values if not isinstance(i, Integral) or i not in special]

    def _find(self, token: str) -> int | None:
        """The id of a token; None without one, as for half of a surrogate pair."""
        try:
            return self.backend.token_to_id(token)
        except UnicodeEncodeError:
            return None

    def _token(self, i: Any) -> str:
        """The token of an id (raises ValueError if there is no such id)."""
        self.id_to_bytes(i)
        return str(self.backend.id_to_token(i))

    # Special tokens.

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, in the order of their ids."""
        return list(self.special_tokens)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens."""
        return list(self.special_tokens.values())

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have an attribute here, by its name."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def unk_token_id(self) -> int | None:
        """The id of "<unk>", or None without one."""
        return self.special_tokens.get("<unk>")

    @property
    def unk_token(self) -> str | None:
        """The token in the place of an unknown one, or None."""
        return self._token_or_none(self.unk_token_id)

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text, or None. It can be set, see `pad_token`."""
        return self._token_or_none(self.bos_token_id)

    @bos_token.setter
    def bos_token(self, token: str | None) -> None:
        self.bos_token_id = self._id_of("bos_token", token)

    @property
    def eos_token(self) -> str | None:
        """The token that ends an answer, or None. It can be set, see `pad_token`; conversations keep "</s>"."""
        return self._token_or_none(self.eos_token_id)

    @eos_token.setter
    def eos_token(self, token: str | None) -> None:
        self.eos_token_id = self._id_of("eos_token", token)

    @property
    def pad_token(self) -> str | None:
        """The token that fills up rows, or None. It can be set to another token of the vocabulary (raises ValueError
        for a text that is not one)."""
        return self._token_or_none(self.pad_token_id)

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self.pad_token_id = self._id_of("pad_token", token)

    def _id_of(self, name: str, token: Any) -> int | None:
        """The id of a token that an attribute is set to; None for None."""
        if token is None:
            return None
        found = self._find(check_text(token, name))
        if found is None:
            raise ValueError(f"{name}={token!r} is not in the vocabulary; allowed: a token that is")
        return found

    def _token_or_none(self, i: int | None) -> str | None:
        if i is None:
            return None
        return self._token(i)

    # Names that change nothing here.

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Raise ValueError, except for an empty list: no tokens can be added. Returns 0: no token is new."""
        if isinstance(new_tokens, (list, tuple)) and not new_tokens:
            return 0
        unused = [name for name in self.special_tokens if name.startswith("<SPECIAL_")]
        cure = "use a token of the vocabulary"
        if unused:
            cure = f"use one of the unused special tokens, such as {unused[0]}"
        raise ValueError(f"{brief(new_tokens)}: tokens cannot be added; {cure}")

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Set `bos_token`, `eos_token` and `pad_token` to tokens of the vocabulary. Returns 0: no token is new.

        Raises:
            ValueError: another key, or a token that is not in the vocabulary.
        """
        if not isinstance(special_tokens_dict, Mapping):
            allowed = "an object, such as {'pad_token': '</s>'}"
            raise ValueError(f"special_tokens_dict is {brief(special_tokens_dict)}; allowed: {allowed}")
        for name, token in special_tokens_dict.items():
            settable = name in ("bos_token", "eos_token", "pad_token") and isinstance(token, str)
            if not settable or self._find(token) is None:
                self.add_tokens(token)
        for name, token in special_tokens_dict.items():
            setattr(self, name, token)
        return 0

    @property
    def chat_template(self) -> None:
        """None: no templates are run."""

    @chat_template.setter
    def chat_template(self, template: Any) -> None:
        if template is not None:
            reason = "templates are not run; version selects Mistral's layout"
            raise ValueError(f"chat_template cannot be set: {reason}")

    @property
    def add_bos_token(self) -> bool:
        """True: a text begins with "<s>"."""
        return True

    @add_bos_token.setter
    def add_bos_token(self, value: Any) -> None:
        if value is not True:
            raise ValueError(f"add_bos_token={brief(value)} is not supported; give add_special_tokens=False")

    @property
    def add_eos_token(self) -> bool:
        """False: a text ends without "</s>"."""
        return False

    @add_eos_token.setter
    def add_eos_token(self, value: Any) -> None:
        if value is not False:
            cure = "append tokenizer.eos_token_id to the ids"
            raise ValueError(f"add_eos_token={brief(value)} is not supported; {cure}")


def list_of_texts(text: Any) -> list[str]:
    """The texts in a text or a list of texts.

    Raises:
        ValueError: no text, or something else.
    """
    if isinstance(text, str):
        return [text]
    if not isinstance(text, (list, tuple)) or not text:
        raise ValueError(f"text is {brief(text)}; allowed: a text, or a list of at least one")
    return [check_text(item, f"text[{place}]") for place, item in enumerate(text)]


def to_lists(value: Any) -> Any:
    """Convert arrays and tensors to lists, also inside lists."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [to_lists(item) for item in value]
    return value
