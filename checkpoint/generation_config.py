"""generation_config.json: the settings of `generate`, what each may be, and those that come with a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from checks import is_number

from .files import GENERATION, read_json_object


def _is_one_or_list(value: Any, valid: Callable[[Any], bool]) -> bool:
    """Whether a value is valid, or a list of valid values."""
    if isinstance(value, (list, tuple)):
        return all(map(valid, value))
    return valid(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: Any) -> bool:
    return is_number(value, Integral, 0)


# The settings of `generate`: what each may be, in words and as a test. NumPy's numbers are numbers, too.
SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "do_sample": ("true or false", _is_bool),
    "temperature": (
        "a number not below 0 (0 always takes the most likely token)",
        lambda value: is_number(value, Real, 0),
    ),
    "top_k": ("a whole number not below 0 (0 is off)", lambda value: is_number(value, Integral, 0)),
    "top_p": (
        "a number above 0, at most 1 (1 is off)",
        lambda value: is_number(value, Real, 0, 1) and value > 0,
    ),
    "min_p": ("a number from 0 to 1 (0 is off)", lambda value: is_number(value, Real, 0, 1)),
    "repetition_penalty": (
        "a number from 0.01 to 100 (1 is off)",
        lambda value: is_number(value, Real, 0.01, 100),
    ),
    "max_new_tokens": ("a whole number not below 1", lambda value: is_number(value, Integral, 1)),
    "max_length": ("a whole number not below 1", lambda value: is_number(value, Integral, 1)),
    "num_return_sequences": ("a whole number not below 1", lambda value: is_number(value, Integral, 1)),
    "seed": ("a whole number from 0 to 2**63 - 1", lambda value: is_number(value, Integral, 0, 2**63 - 1)),
    "stop_strings": (
        "a text that is not empty, or a list of such",
        lambda value: _is_one_or_list(value, _is_text),
    ),
    "bos_token_id": ("a token id", _is_id),
    "pad_token_id": ("a token id", _is_id),
    "eos_token_id": ("a token id, or a list of such", lambda value: _is_one_or_list(value, _is_id)),
    "return_dict_in_generate": ("true or false", _is_bool),
    "output_scores": ("true or false", _is_bool),
    "output_logits": ("true or false", _is_bool),
}
# Settings of a single call. A generation_config.json has no influence on them.
OF_A_CALL = {"seed", "return_dict_in_generate", "output_scores", "output_logits"}


def check_setting(name: str, value: Any, where: str = "") -> None:
    """Raise ValueError, which begins with `where`, unless a setting of `generate` may have this value. None always
    may: the setting is not given."""
    allowed, valid = SETTINGS[name]
    if value is not None and not valid(value):
        raise ValueError(f"{where}{name}={value!r} is impossible; allowed: {allowed}")


# Settings in a generation_config.json that change no text, or none without another that does.
HARMLESS_SETTINGS = {
    "_from_model_config", "_commit_hash", "transformers_version", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "low_memory", "compile_config", "disable_compile",
    "prefill_chunk_size", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "renormalize_logits", "remove_invalid_values", "early_stopping",
    "length_penalty", "num_beam_groups", "diversity_penalty", "decoder_start_token_id", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "target_lookbehind", "assistant_early_exit", "assistant_lookbehind", "max_matching_ngram_size",
    "prompt_lookup_num_tokens", "use_mtp", "assistant_ensemble_weight", "speculation_type",
    "continuous_batching_config",
}  # fmt: skip
# Off at 1; all others are off at 0, null, false or empty.
OFF_AT_ONE = ("num_beams", "typical_p", "guidance_scale", "encoder_repetition_penalty")


def changes_text(name: str, value: Any) -> bool:
    """Whether a setting that `generate` does not know would change the text."""
    if name in HARMLESS_SETTINGS or not value:
        return False
    return not (name in OFF_AT_ONE and value == 1)


@dataclass(init=False)
class GenerationConfig:
    """The settings of `generate`, by Transformers' names: those of a model's generation_config.json, or those that are
    given to `generate`. None: not given. `others` are those that `generate` does not know; they are kept for
    `save_pretrained`.

    Raises:
        ValueError: an impossible value.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    num_return_sequences: int | None = None
    stop_strings: str | list[str] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def __init__(self, **settings: Any) -> None:
        self.others = {}
        known = {each.name for each in fields(self)} - {"others"}
        for name, value in settings.items():
            if name in known:
                check_setting(name, value)
                setattr(self, name, value)
            else:
                self.others[name] = value

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GenerationConfig:
        """Read the generation_config.json of a model directory; without one, every setting is None. A warning names
        the settings in it that `generate` does not support and that would change the text.

        Raises:
            ValueError: the file is not a JSON object, or a value in it is impossible.
        """
        path = Path(directory) / GENERATION
        if not path.exists():
            return cls()
        content = read_json_object(path)
        others = {name: value for name, value in content.items() if name in OF_A_CALL}
        settings = {name: value for name, value in content.items() if name not in OF_A_CALL}
        for name in SETTINGS.keys() & settings.keys():
            check_setting(name, settings[name], f"{path}: ")
        config = cls(**settings)
        config.others |= others
        ignored = [f"{name}={value!r}" for name, value in config.others.items() if changes_text(name, value)]
        if ignored:
            warnings.warn(f"{path}: not supported here, and left out: {', '.join(ignored)}", stacklevel=1)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: the settings that are not None, and `others`."""
        settings = asdict(self)
        others: dict[str, Any] = settings.pop("others")
        return {name: value for name, value in settings.items() if value is not None} | others
