"""generation_config.json: the settings of `generate`, what each may be, and those that come with a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from checks import brief, has_effect, is_number

from .files import GENERATION, read_json_object
from .hub import find


def _is_one_or_list(value: Any, valid: Callable[[Any], bool]) -> bool:
    """Whether a value is valid, or a list of valid values."""
    if isinstance(value, (list, tuple)):
        return all(map(valid, value))
    return valid(value)


# The values that a setting may have. With `Integral` and `Real`, NumPy's numbers are accepted, too.


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_texts(value: Any) -> bool:
    return _is_one_or_list(value, _is_text)


def _is_id(value: Any) -> bool:
    return is_number(value, Integral, 0)


def _is_ids(value: Any) -> bool:
    return _is_one_or_list(value, _is_id)


def _is_count(value: Any) -> bool:
    return is_number(value, Integral, 1)


def _is_temperature(value: Any) -> bool:
    return is_number(value, Real, 0)


def _is_top_p(value: Any) -> bool:
    return is_number(value, Real, 0, 1) and value > 0


def _is_min_p(value: Any) -> bool:
    return is_number(value, Real, 0, 1)


def _is_penalty(value: Any) -> bool:
    return is_number(value, Real, 0.01, 100)


def _is_seed(value: Any) -> bool:
    return is_number(value, Integral, 0, 2**63 - 1)


# The settings of `generate`: the values that each may have, in words and as a function.
SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "do_sample": ("true or false", _is_bool),
    "temperature": ("a number not below 0 (0 always takes the most likely token)", _is_temperature),
    "top_k": ("a whole number not below 0 (0 is off)", _is_id),
    "top_p": ("a number above 0, at most 1 (1 is off)", _is_top_p),
    "min_p": ("a number from 0 to 1 (0 is off)", _is_min_p),
    "repetition_penalty": ("a number from 0.01 to 100 (1 is off)", _is_penalty),
    "max_new_tokens": ("a whole number not below 1", _is_count),
    "max_length": ("a whole number not below 1", _is_count),
    "num_return_sequences": ("a whole number not below 1", _is_count),
    "seed": ("a whole number from 0 to 2**63 - 1", _is_seed),
    "stop_strings": ("a text that is not empty, or a list of such", _is_texts),
    "bos_token_id": ("a token id", _is_id),
    "pad_token_id": ("a token id", _is_id),
    "eos_token_id": ("a token id, or a list of such", _is_ids),
    "return_dict_in_generate": ("true or false", _is_bool),
    "output_scores": ("true or false", _is_bool),
    "output_logits": ("true or false", _is_bool),
}
# Settings of a single call. A generation_config.json has no influence on them.
CALL_ONLY_SETTINGS = {"seed", "return_dict_in_generate", "output_scores", "output_logits"}


def check_setting(name: str, value: Any, where: str = "") -> None:
    """Raise ValueError, which begins with `where`, unless a setting of `generate` may have this value. None is always
    valid and means: not given."""
    allowed, valid = SETTINGS[name]
    if value is not None and not valid(value):
        raise ValueError(f"{where}{name}={brief(value)} is impossible; allowed: {allowed}")


# ------------------------------------------------------------------------------- settings that are not supported


SAMPLING = "supported: greedy decoding, and sampling with num_return_sequences"
ASSISTANT = "leave it out: assisted decoding gives the same text"
FILTER = "supported: top_k, top_p, min_p, and any function of the logits in logits_processor"
PROCESSOR = "supported: any function of the logits in logits_processor"
OUTPUTS = "supported: output_scores and output_logits"
MASK = "leave it out: attention_mask decides it"
# Settings and arguments of Transformers' `generate` that are not supported, each with a cure: those that would change
# the text, and the others.
CHANGES_TEXT = {
    "num_beams": SAMPLING,
    "constraints": SAMPLING,
    "force_words_ids": SAMPLING,
    "penalty_alpha": SAMPLING,
    "dola_layers": SAMPLING,
    "custom_generate": SAMPLING,
    "typical_p": FILTER,
    "top_h": FILTER,
    "epsilon_cutoff": FILTER,
    "eta_cutoff": FILTER,
    "min_length": PROCESSOR,
    "min_new_tokens": PROCESSOR,
    "no_repeat_ngram_size": PROCESSOR,
    "bad_words_ids": PROCESSOR,
    "suppress_tokens": PROCESSOR,
    "begin_suppress_tokens": PROCESSOR,
    "forced_bos_token_id": PROCESSOR,
    "forced_eos_token_id": PROCESSOR,
    "sequence_bias": PROCESSOR,
    "guidance_scale": PROCESSOR,
    "negative_prompt_ids": PROCESSOR,
    "negative_prompt_attention_mask": PROCESSOR,
    "prefix_allowed_tokens_fn": PROCESSOR,
    "exponential_decay_length_penalty": PROCESSOR,
    "encoder_repetition_penalty": PROCESSOR,
    "encoder_no_repeat_ngram_size": PROCESSOR,
    "watermarking_config": PROCESSOR,
    "max_time": "supported: a function in stopping_criteria",
    "token_healing": "end the prompt at the end of a word",
    "position_ids": MASK,
    "cache_position": MASK,
    "token_type_ids": MASK,
    "inputs_embeds": "supported: input_ids, and images in pixel_values",
}
CHANGES_NO_TEXT = {
    "assistant_model": ASSISTANT,
    "assistant_tokenizer": ASSISTANT,
    "assistant_early_exit": ASSISTANT,
    "prompt_lookup_num_tokens": ASSISTANT,
    "num_assistant_tokens": ASSISTANT,
    "use_mtp": ASSISTANT,
    "remove_invalid_values": PROCESSOR,
    "renormalize_logits": PROCESSOR,
    "output_attentions": OUTPUTS,
    "output_hidden_states": OUTPUTS,
    "logits_to_keep": OUTPUTS,
    "use_cache": "supported: True; generate.generate_naive is the loop without a cache",
    "cache": "give a KVCache as past_key_values",
    "cache_implementation": "supported: 'dynamic'; compile=True is faster for long texts",
    "synced_gpus": "supported: one process",
}
UNSUPPORTED = CHANGES_TEXT | CHANGES_NO_TEXT
# The value that is the same as leaving the setting out, where that is not None or False.
WITHOUT_EFFECT = {
    "num_beams": 1, "typical_p": 1, "guidance_scale": 1, "encoder_repetition_penalty": 1, "use_cache": True,
    "cache_implementation": "dynamic", "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "penalty_alpha": 0,
}  # fmt: skip
# Settings of Transformers that have no influence on what is returned; the first four concern beams only.
HARMLESS_SETTINGS = {
    "num_beam_groups", "length_penalty", "early_stopping", "diversity_penalty",
    "_from_model_config", "_commit_hash", "transformers_version", "cache_config", "max_cache_len",
    "low_memory", "compile_config", "disable_compile", "prefill_chunk_size", "decoder_start_token_id",
    "is_assistant",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "target_lookbehind",
    "assistant_lookbehind", "max_matching_ngram_size", "assistant_ensemble_weight", "speculation_type",
    "continuous_batching_config",
}  # fmt: skip


def changes_text(name: str, value: Any) -> bool:
    """Whether a setting of a generation_config.json that `generate` does not know would change the text."""
    if name in HARMLESS_SETTINGS | CHANGES_NO_TEXT.keys() | CALL_ONLY_SETTINGS:
        return False
    return has_effect(value, WITHOUT_EFFECT.get(name))


# ------------------------------------------------------------------------------------------------------- the file


@dataclass(init=False)
class GenerationConfig:
    """The settings of `generate`, by Transformers' names: those of a model's generation_config.json, or those that are
    given to `generate`.

    Attributes:
        others: the settings that `generate` does not know, kept for `save_pretrained`. Of the settings, None means: not
            given.
        of_file: those of `others` that were in the file. A warning named the ones that are left out. `generate` refuses
            others that are set later.

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
    of_file: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __init__(self, **settings: Any) -> None:
        self.others = {}
        self.of_file = {}
        self.update(**settings)

    def update(self, **settings: Any) -> None:
        """Set several settings (raises ValueError for an impossible value)."""
        for name, value in settings.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in {each.name for each in fields(self)}:
            if name in SETTINGS:
                check_setting(name, value)
            super().__setattr__(name, value)
        else:
            self.others[name] = value

    def __getattr__(self, name: str) -> Any:
        """A setting in `others`; None for one of Transformers that is not set."""
        others = self.__dict__.get("others", {})
        if name in others:
            return others[name]
        if name in UNSUPPORTED or name in HARMLESS_SETTINGS:
            return None
        raise AttributeError(f"GenerationConfig has no {name}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str | Path) -> GenerationConfig:
        """Read the generation_config.json of a model directory or of a Hub repository; without one, every setting is
        None. A warning names the settings in it that `generate` does not support and that would change the text.

        Raises:
            FileNotFoundError: no such directory or repository.
            ValueError: the file is not a JSON object, or a value in it is impossible.
        """
        path = find(pretrained_model_name, parts="tokenizer") / GENERATION
        if not path.exists():
            return cls()
        content = read_json_object(path)
        others = {name: value for name, value in content.items() if name in CALL_ONLY_SETTINGS}
        settings = {name: value for name, value in content.items() if name not in CALL_ONLY_SETTINGS}
        for name in SETTINGS.keys() & settings.keys():
            check_setting(name, settings[name], f"{path}: ")
        config = cls(**settings)
        config.others |= others
        config.of_file = dict(config.others)
        ignored = [f"{name}={value!r}" for name, value in config.others.items() if changes_text(name, value)]
        if ignored:
            warnings.warn(f"{path}: not supported here, and left out: {', '.join(ignored)}", stacklevel=1)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of the file: the settings that are not None, and `others`."""
        settings = asdict(self)
        settings.pop("of_file")
        others: dict[str, Any] = settings.pop("others")
        return {name: value for name, value in settings.items() if value is not None} | others

    to_diff_dict = to_dict  # the name that Transformers' pipelines call
