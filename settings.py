"""The settings of one call of `generate`: arguments are checked, and those that are None get a value.

A value comes from the call, else from the model's generation_config.json (`GenerationConfig`), else from its
config.json, else from a default. `resolve` merges the first two; each other function chooses one value.
`generate.resolve_sampling` does the same for the settings of `Sampling`. `transformers_call` is for `model.generate`,
which has the defaults of Transformers.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoint import GenerationConfig, changes_text, check_setting
from checks import as_padding_mask, expect_ids, expect_kind, is_number, warn_of_padding
from ministral import KVCache, MinistralConfig

if TYPE_CHECKING:
    from tokenizer import StopText, Tokenizer

DEFAULT_LENGTH = 128  # new tokens, where neither the call nor the model's files give a number


def first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def as_list(value: Any) -> list[Any]:
    """[] for None, [value] for one value, a list for several."""
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


# ----------------------------------------------------------------------------------------- from several sources


# Arguments of Transformers' `generate` that are not supported: the cure, and their names.
REFUSED = (
    (
        "supported: greedy decoding, and sampling with num_return_sequences",
        "num_beams num_beam_groups length_penalty early_stopping diversity_penalty constraints force_words_ids"
        " penalty_alpha dola_layers custom_generate",
    ),
    (
        "leave it out: assisted decoding gives the same text",
        "assistant_model assistant_tokenizer assistant_early_exit prompt_lookup_num_tokens num_assistant_tokens"
        " use_mtp",
    ),
    (
        "supported: top_k, top_p, min_p, and any function of the logits in logits_processor",
        "typical_p top_h epsilon_cutoff eta_cutoff",
    ),
    (
        "supported: any function of the logits in logits_processor",
        "min_length min_new_tokens no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens"
        " forced_bos_token_id forced_eos_token_id sequence_bias guidance_scale negative_prompt_ids"
        " negative_prompt_attention_mask prefix_allowed_tokens_fn exponential_decay_length_penalty"
        " encoder_repetition_penalty encoder_no_repeat_ngram_size remove_invalid_values renormalize_logits"
        " watermarking_config",
    ),
    ("supported: output_scores and output_logits", "output_attentions output_hidden_states logits_to_keep"),
    ("leave it out: attention_mask decides it", "position_ids cache_position token_type_ids"),
    ("supported: input_ids, and images in pixel_values", "inputs_embeds"),
    ("supported: a function in stopping_criteria", "max_time"),
    ("end the prompt at the end of a word", "token_healing"),
    ("supported: True; generate.generate_naive is the loop without a cache", "use_cache"),
    ("give a KVCache as past_key_values", "cache"),
    ("supported: 'dynamic'; compile=True is faster for long texts", "cache_implementation"),
    ("supported: one process", "synced_gpus"),
)
CURES = {name: cure for cure, names in REFUSED for name in names.split()}
# The value of such an argument that is the same as leaving it out, where that is not 0 or False.
NO_EFFECT = {
    "num_beams": 1, "num_beam_groups": 1, "length_penalty": 1, "typical_p": 1, "guidance_scale": 1,
    "encoder_repetition_penalty": 1, "use_cache": True, "cache_implementation": "dynamic",
}  # fmt: skip
CALL_SETTINGS = {each.name for each in fields(GenerationConfig)} - {"others"}


def refuse_argument(name: str, value: Any) -> None:
    """Raise ValueError for an argument of Transformers' `generate` that is not supported, unless it has no effect."""
    if name not in CURES:
        raise ValueError(f"generate has no argument {name}; docs/transformers.md has a table of them")
    no_effect = value is None
    if isinstance(value, (bool, int, float, str)):
        no_effect = value == NO_EFFECT.get(name, 0)
    if isinstance(value, (list, tuple, dict)):
        no_effect = not value
    if not no_effect:
        raise ValueError(f"{name}={reprlib.repr(value)} is not supported; {CURES[name]}")


def call_settings(generation_config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings that a call of `generate` gives, in its arguments or in a `generation_config` (that of this project,
    or Transformers'). Arguments have precedence.

    Raises:
        ValueError: an unknown or unsupported argument, or an impossible value.
    """
    if generation_config is not None and not hasattr(generation_config, "to_dict"):
        found = type(generation_config).__name__
        raise ValueError(f"generation_config must be a GenerationConfig; found {found}")
    settings = {}
    if generation_config is not None:
        for name, value in generation_config.to_dict().items():
            if name in CALL_SETTINGS:
                settings[name] = value
            elif changes_text(name, value):
                refuse_argument(name, value)
    for name, value in arguments.items():
        if name not in CALL_SETTINGS:
            refuse_argument(name, value)
        elif value is not None:
            settings[name] = value
    for name, value in settings.items():
        check_setting(name, value)
    return {name: value for name, value in settings.items() if value is not None}


def resolve(stored: GenerationConfig, call: dict[str, Any]) -> GenerationConfig:
    """The settings of a call (see `call_settings`), and those of the model where the call does not give one."""
    return GenerationConfig(**stored.to_dict() | call)


# ------------------------------------------------------------------------------------- `model.generate`, as there


NEW_TOKENS, TOP_K = 20, 50  # Transformers' defaults


def transformers_call(model: Any, inputs: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `generate` from those of `model.generate(inputs, **arguments)`, with Transformers' defaults: 20
    new tokens, sampling only with `do_sample`, and then from the 50 most likely tokens; `pad_token_id` in the prompts
    is padding where no mask is given; without prompts, a text begins with `bos_token_id`.

    Args:
        inputs: ids (B, T), or the mapping that a tokenizer returns.

    Raises:
        ValueError: prompts given twice, or none and no `bos_token_id`; as `call_settings`.
    """
    call = dict(arguments)
    if isinstance(inputs, Mapping):
        call = dict(inputs) | call
    elif inputs is not None:
        if call.get("input_ids") is not None:
            raise ValueError("give either inputs or input_ids")
        call["input_ids"] = inputs

    named = {name: value for name, value in call.items() if name in CALL_SETTINGS}
    chosen = resolve(model.generation_config, call_settings(call.get("generation_config"), named))
    config = model.config.get_text_config()
    call["do_sample"] = bool(chosen.do_sample)
    if call["do_sample"] and chosen.top_k is None:
        call["top_k"] = TOP_K
    if chosen.max_new_tokens is None and chosen.max_length is None:
        call["max_new_tokens"] = NEW_TOKENS
    if call.get("input_ids") is None:
        bos = first_given(chosen.bos_token_id, config.bos_token_id, -1)
        if bos < 0:
            raise ValueError("no prompt, and no bos_token_id to begin with; give input_ids")
        call["input_ids"] = torch.tensor([[bos]])
    if call.get("attention_mask") is None:
        call["attention_mask"] = mask_of_padding(call["input_ids"], chosen, config)
    return call


def mask_of_padding(input_ids: Tensor, chosen: GenerationConfig, config: MinistralConfig) -> Tensor | None:
    """The mask (B, T) that hides `pad_token_id`; None if there is none in the ids, or if it also ends texts."""
    ends = ending_ids(chosen, config)
    pad = first_given(chosen.pad_token_id, config.pad_token_id, -1)
    expect_ids(input_ids, config.vocab_size)
    if pad in ends or not (input_ids == pad).any():
        return None
    return input_ids != pad


# ------------------------------------------------------------------------------------------------- the prompt


def check_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    config: MinistralConfig,
    device: torch.device,
) -> Tensor:
    """The padding mask of the prompts: bool (B, T) on the CPU, False at padding.

    Raises:
        ValueError: the prompts are not ids (B, T), a row ends with padding, or the cache does not fit the prompts.
    """
    expect_kind("past_key_values", cache, KVCache, "a KVCache of ministral.py")
    expect_ids(input_ids, config.vocab_size)  # the fast path does not check them
    warn_of_padding(input_ids, attention_mask, config, ends=True)
    B, T = input_ids.shape
    if cache is not None:
        cache.key_positions(config, 1, device)  # raises ValueError for the cache of another configuration
        past = cache.get_seq_length()
        if past >= T:
            allowed = "fewer, the last one has to be read"
            raise ValueError(f"past_key_values holds {past} tokens of {T}; allowed: {allowed}")
    if attention_mask is None:
        return torch.ones(B, T, dtype=torch.bool)
    padding_mask = as_padding_mask(attention_mask, B, T).cpu()
    if not padding_mask[:, -1].all():
        layout = "padding on the left: every row ends with a real token"
        raise ValueError(f"attention_mask must be {(B, T)}, {layout}")
    return padding_mask


def check_length(tokens: int, config: MinistralConfig) -> None:
    """Raise ValueError if a prompt of that many tokens leaves no position for a new one."""
    limit = config.max_position_embeddings
    if tokens >= limit:
        allowed = f"below max_position_embeddings={limit}"
        raise ValueError(f"the prompt has {tokens} tokens; allowed: {allowed}; shorten it")


def choose_chunk_size(given: int | None, device: torch.device) -> int:
    """The number of tokens of the prompt that are read at once (raises ValueError)."""
    if given is None:
        return 512 if device.type == "cpu" else 4096
    if not is_number(given, int, 1):
        raise ValueError(f"prefill_chunk_size={given!r} is impossible; allowed: a whole number not below 1")
    return given


# ---------------------------------------------------------------------------------------------- the new tokens


def choose_length(chosen: GenerationConfig, prompt: int) -> int:
    """The number of tokens that may follow a prompt of `prompt` tokens. As in Transformers, `max_new_tokens` has
    precedence over `max_length`, which counts the prompt.

    Raises:
        ValueError: `max_length` is not above the prompt.
    """
    if chosen.max_new_tokens is not None:
        return chosen.max_new_tokens
    if chosen.max_length is None:
        return DEFAULT_LENGTH
    if chosen.max_length <= prompt:
        limit = f"max_length={chosen.max_length} (of the call, or of generation_config.json)"
        cure = "give max_new_tokens, or a shorter prompt"
        raise ValueError(f"the prompt has {prompt} tokens, {limit}; {cure}")
    return chosen.max_length - prompt


def reserved_tokens(chosen: GenerationConfig, new_tokens: int) -> int:
    """The number of new tokens, of at most `new_tokens`, that memory is set aside for."""
    if chosen.max_new_tokens is not None:
        return new_tokens
    return min(new_tokens, DEFAULT_LENGTH)  # a `max_length` is often the model's whole context


def ending_ids(chosen: GenerationConfig, config: MinistralConfig) -> list[int]:
    """The ids that end a text: those of the settings, or else those of the configuration (raises ValueError for an id
    that is not in the vocabulary)."""
    ids = first_given(chosen.eos_token_id, config.eos_token_id, ())
    expect_kind("eos_token_id", ids, (int, Collection), "an id or a list of ids")
    ends = as_list(ids)
    if not all(is_number(end, int, 0) and end < config.vocab_size for end in ends):
        raise ValueError(f"eos_token_id={ends} is impossible; allowed: ids below {config.vocab_size}")
    return ends


def padding_id(chosen: GenerationConfig, config: MinistralConfig, ends: Sequence[int]) -> int:
    """The id that fills up rows that have ended (raises as `ending_ids`)."""
    filler: int = first_given(chosen.pad_token_id, config.pad_token_id, *ends, 0)
    if not 0 <= filler < config.vocab_size:
        raise ValueError(f"pad_token_id={filler} is impossible; allowed: an id below {config.vocab_size}")
    return filler


def choose_copies(chosen: GenerationConfig, temperature: float, cache: KVCache | None) -> int:
    """The number of continuations of each row.

    Raises:
        ValueError: several with greedy decoding or with a cache.
    """
    copies: int = first_given(chosen.num_return_sequences, 1)
    if copies == 1:
        return 1
    allowed = "sampling, without a cache"
    if cache is not None:
        raise ValueError(f"num_return_sequences={copies} with past_key_values; allowed: {allowed}")
    if temperature == 0:
        conflict = "greedy decoding, which has one result"
        raise ValueError(f"num_return_sequences={copies} with {conflict}; allowed: {allowed}")
    return copies


def make_generators(
    seed: int | Sequence[int] | None, rows: int, copies: int, device: torch.device
) -> list[torch.Generator]:
    """A generator for each copy of each row; that of the n-th copy has the seed of the row plus n. Without a seed there
    are none, and PyTorch's global generator draws."""
    if seed is None:
        return []
    seeds: list[Any] = [seed] * rows
    if isinstance(seed, Sequence):
        seeds = list(seed)
    if len(seeds) != rows:
        raise ValueError(f"seed must be one number or one for each of {rows} rows; found {len(seeds)}")
    generators = []
    for number in seeds:
        check_setting("seed", number)
        for copy in range(copies):
            generator = torch.Generator(device)
            generator.manual_seed((int(number) + copy) % 2**63)
            generators.append(generator)
    return generators


def make_stop_texts(
    chosen: GenerationConfig, tokenizer: Tokenizer | None, input_ids: Tensor, padding_mask: Tensor
) -> list[StopText]:
    """One `StopText` for each row of the prompts (B, T); [] without stop texts."""
    texts = as_list(chosen.stop_strings)
    if not texts:
        return []
    if tokenizer is None:
        raise ValueError(f"stop_strings={texts} without a tokenizer; give tokenizer=..., or stop_strings=()")
    from tokenizer import StopText, Tokenizer  # imported late: only stop texts need them

    expect_kind("tokenizer", tokenizer, Tokenizer, "the Tokenizer of this project")
    prompts = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), padding_mask)]
    return [StopText(tokenizer, texts, prompt) for prompt in prompts]
