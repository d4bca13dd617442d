"""The settings of one call of `generate`: arguments are checked, and those that are None get a value.

A value comes from the call, else from the model's generation_config.json (`GenerationConfig`), else from its
config.json, else from a default. `resolve` merges the first two; each other function chooses one value.
`generate.resolve_sampling` does the same for the settings of `Sampling`. `transformers_call` is for `model.generate`,
which has the defaults of Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoint import SETTINGS, GenerationConfig, check_setting
from checkpoint.generation_config import HARMLESS_SETTINGS, UNSUPPORTED, WITHOUT_EFFECT
from checks import (
    as_list,
    as_padding_mask,
    expect_ids,
    expect_kind,
    is_number,
    refuse_argument,
    warn_of_padding,
)
from ministral import KVCache, MinistralConfig

if TYPE_CHECKING:
    from tokenizer import StopText, Tokenizer

DEFAULT_LENGTH = 128  # new tokens, where neither the call nor the model's files give a number


def first_given(*values: Any) -> Any:
    """The first value that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)


# ----------------------------------------------------------------------------------------- from several sources


GENERATION_SETTINGS = {each.name for each in fields(GenerationConfig)} & SETTINGS.keys()
# For settings that are None in a call of `model.generate`: the values that are off.
OFF = {
    "top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "repetition_penalty": 1.0, "eos_token_id": (),
    "stop_strings": (), "num_return_sequences": 1, "do_sample": False,
}  # fmt: skip


def given_settings(generation_config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings that a call of `generate` gives, in its arguments or in a `generation_config` (that of this project,
    or Transformers'). Arguments have precedence.

    Raises:
        ValueError: an unknown or unsupported argument or setting, or an impossible value.
    """
    settings = {}
    if generation_config is not None:
        if not hasattr(generation_config, "to_dict"):
            found = type(generation_config).__name__
            raise ValueError(f"generation_config must be a GenerationConfig; found {found}")
        settings.update(generation_config.to_dict())
    for name, value in arguments.items():
        if value is not None or name not in settings:
            settings[name] = value

    for name, value in settings.items():
        if name == "seed":
            raise ValueError("seed is an argument of generate, and no setting of a GenerationConfig")
        if name in GENERATION_SETTINGS:
            check_setting(name, value)
        elif name in HARMLESS_SETTINGS:
            continue
        elif name in UNSUPPORTED:
            refuse_argument(name, value, UNSUPPORTED[name], WITHOUT_EFFECT.get(name))
        else:
            raise ValueError(f"generate has no argument {name}; docs/transformers.md has a table of them")
    known = {name: value for name, value in settings.items() if name in GENERATION_SETTINGS}
    return {name: value for name, value in known.items() if value is not None}


def resolve(stored: Any, given: dict[str, Any]) -> GenerationConfig:
    """The settings of a call (see `given_settings`), and those of `model.generation_config` where the call does not
    give one.

    Raises:
        ValueError: the latter has a setting that is not supported and was not in the model's file.
    """
    if stored is None:
        stored = GenerationConfig()
    if not isinstance(stored, GenerationConfig):
        stored = GenerationConfig(**given_settings(stored, {}))  # Transformers' class
    set_later = {name: value for name, value in stored.others.items() if stored.of_file.get(name) != value}
    given_settings(None, set_later)
    settings = {name: getattr(stored, name) for name in GENERATION_SETTINGS}
    return GenerationConfig(**settings | given)


# ------------------------------------------------------------------------------------- `model.generate`, as there


TRANSFORMERS_NEW_TOKENS = 20
TRANSFORMERS_TOP_K = 50


def transformers_call(model: Any, inputs: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `generate` from those of `model.generate(inputs, **arguments)`.

    Where neither the call nor the model's files give a value, it is the default of Transformers:

        max_new_tokens  20
        do_sample       False, also where there is a temperature
        top_k           50, with do_sample
        attention_mask  0 at every `pad_token_id`
        input_ids       `bos_token_id`

    Args:
        model: the model that continues the texts.
        inputs: ids (B, T), or the mapping that a tokenizer returns.
        arguments: those of `generate`. As in Transformers, None switches a setting of the model's files off.

    Raises:
        ValueError: an argument that is also in `inputs`; neither prompts nor a `bos_token_id`; as `given_settings`.
    """
    call = {name: value for name, value in arguments.items() if value is not None}
    switched_off = [name for name in OFF if name in arguments and arguments[name] is None]
    if inputs is not None:
        if not isinstance(inputs, Mapping):
            inputs = {"input_ids": inputs}
        twice = sorted(inputs.keys() & call.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)}: given in inputs and as an argument; give one of the two")
        call.update(inputs)

    call.update({name: OFF[name] for name in switched_off})
    settings = {name: value for name, value in call.items() if name in GENERATION_SETTINGS}
    resolved = resolve(model.generation_config, given_settings(call.get("generation_config"), settings))
    call["do_sample"] = bool(resolved.do_sample)
    if resolved.do_sample and resolved.top_k is None:
        call["top_k"] = TRANSFORMERS_TOP_K
    if not resolved.do_sample:
        for name in {"top_k", "top_p", "min_p", "temperature"} & set(switched_off):
            del call[name]
    if resolved.max_new_tokens is None and resolved.max_length is None:
        call["max_new_tokens"] = TRANSFORMERS_NEW_TOKENS

    config = model.config.get_text_config()
    if "input_ids" not in call:
        bos = first_given(resolved.bos_token_id, config.bos_token_id)
        if bos is None:
            raise ValueError("no prompt, and no bos_token_id to begin with; give input_ids")
        call["input_ids"] = torch.tensor([[bos]])
    if "attention_mask" not in call:
        call["attention_mask"] = mask_of_padding(call["input_ids"], resolved, config)
    return call


def mask_of_padding(input_ids: Tensor, resolved: GenerationConfig, config: MinistralConfig) -> Tensor | None:
    """The mask (B, T) that hides `pad_token_id`; None if there is none in the ids, or if it also ends texts."""
    ends = ending_ids(resolved, config)
    pad = first_given(resolved.pad_token_id, config.pad_token_id)
    expect_ids(input_ids, config.vocab_size)
    if pad is None or pad in ends or not (input_ids == pad).any():
        return None
    return input_ids != pad


# ---------------------------------------------------------------------------------------------------- the plan


@dataclass
class Plan:
    """What a call of `generate` does, as numbers and tensors.

    Attributes:
        padding_mask: bool (B, T) on the CPU, False at padding.
        chunk_size: tokens of the prompt that are read at once.
        max_positions: tokens that a row has at most, without its padding.
        new_tokens: the number of steps at most.
        reserved: new tokens that memory is set aside for.
        ends: ids that end a row.
        filler: the id that fills up a row that has ended.
        copies: continuations of each row.
        generators: one for each continuation; []: PyTorch's global generator draws for all.
    """

    padding_mask: Tensor
    chunk_size: int
    max_positions: int
    new_tokens: int
    reserved: int
    ends: list[int]
    filler: int
    copies: int
    generators: list[torch.Generator]


def make_plan(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, cache: KVCache | None,
    resolved: GenerationConfig, temperature: float, seed: int | Sequence[int] | None, chunk_size: int | None,
) -> Plan:  # fmt: skip
    """The plan of a call (raises ValueError as the functions below)."""
    config, device = model.config.get_text_config(), model.device
    padding_mask = check_prompt(input_ids, attention_mask, cache, resolved, config, device)
    B, T = input_ids.shape
    lengths = padding_mask.sum(dim=1)
    check_length(int(lengths.max()), config)
    # The shortest row can get the most new tokens, so it sets the number of steps. Longer ones are full before.
    room = config.max_position_embeddings - int(lengths.min())
    new_tokens = min(choose_length(resolved, T), room)
    ends = ending_ids(resolved, config)
    copies = choose_copies(resolved, temperature, cache)
    return Plan(
        padding_mask=padding_mask,
        chunk_size=choose_chunk_size(chunk_size, device),
        max_positions=config.max_position_embeddings,
        new_tokens=new_tokens,
        reserved=reserved_tokens(resolved, new_tokens),
        ends=ends,
        filler=padding_id(resolved, config, ends),
        copies=copies,
        generators=make_generators(seed, B, copies, device),
    )


# ------------------------------------------------------------------------------------------------- the prompt


def check_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    resolved: GenerationConfig,
    config: MinistralConfig,
    device: torch.device,
) -> Tensor:
    """The padding mask of the prompts: bool (B, T) on the CPU, False at padding.

    Raises:
        ValueError: the prompts are not ids (B, T), a row ends with padding, or the cache does not fit the prompts.
    """
    expect_kind("past_key_values", cache, KVCache, "a KVCache of ministral.py")
    expect_ids(input_ids, config.vocab_size)  # the fast path does not check them
    pad = first_given(resolved.pad_token_id, config.pad_token_id)
    warn_of_padding(input_ids, attention_mask, config, pad, edges=[0, -1])
    B, T = input_ids.shape
    if cache is not None:
        cache.key_positions(config, 1, device)  # raises ValueError for the cache of another configuration
        past = cache.get_seq_length()
        if past >= T:
            cure = "the prompt must have at least one token more"
            raise ValueError(f"past_key_values holds {past} tokens, the prompt has {T}; {cure}")
    if attention_mask is None:
        return torch.ones(B, T, dtype=torch.bool)
    padding_mask = as_padding_mask(attention_mask, B, T).cpu()
    if not padding_mask[:, -1].all():
        raise ValueError("attention_mask must be 1 at the last token of every row: put padding on the left")
    return padding_mask


def check_length(tokens: int, config: MinistralConfig) -> None:
    """Raise ValueError if a prompt of that many tokens leaves no position for a new one."""
    limit = config.max_position_embeddings
    if tokens >= limit:
        allowed = f"below max_position_embeddings={limit}"
        raise ValueError(f"the prompt has {tokens} tokens; allowed: {allowed}; shorten it")


def check_characters(text: str | None, config: MinistralConfig) -> None:
    """Raise ValueError if a text is too long by far for the positions of a model. Cutting it into tokens could take
    minutes, and tokens have less than 6 bytes on average."""
    limit = 16 * config.max_position_embeddings
    if text is not None and len(text) > limit:
        allowed = f"{limit}, 16 for each of the {config.max_position_embeddings} positions"
        raise ValueError(f"the prompt has {len(text)} characters; allowed: {allowed}; shorten it")


def choose_chunk_size(given: int | None, device: torch.device) -> int:
    """The number of tokens of the prompt that are read at once (raises ValueError)."""
    if given is None:
        return 512 if device.type == "cpu" else 4096
    if not is_number(given, int, 1):
        raise ValueError(f"prefill_chunk_size={given!r} is impossible; allowed: a whole number not below 1")
    return given


# ---------------------------------------------------------------------------------------------- the new tokens


def choose_length(resolved: GenerationConfig, prompt: int) -> int:
    """The number of tokens that may follow a prompt of `prompt` tokens. As in Transformers, `max_new_tokens` has
    precedence over `max_length`, which counts the prompt.

    Raises:
        ValueError: `max_length` is not above the prompt.
    """
    if resolved.max_new_tokens is not None:
        return resolved.max_new_tokens
    if resolved.max_length is None:
        return DEFAULT_LENGTH
    if resolved.max_length <= prompt:
        limit = f"max_length={resolved.max_length} (of the call, or of generation_config.json)"
        cure = "give max_new_tokens, or a shorter prompt"
        raise ValueError(f"the prompt has {prompt} tokens, {limit}; {cure}")
    return resolved.max_length - prompt


def reserved_tokens(resolved: GenerationConfig, new_tokens: int) -> int:
    """The number of new tokens, of at most `new_tokens`, that memory is set aside for."""
    if resolved.max_new_tokens is not None:
        return new_tokens
    return min(new_tokens, DEFAULT_LENGTH)  # a `max_length` is often the model's whole context


def ending_ids(resolved: GenerationConfig, config: MinistralConfig) -> list[int]:
    """The ids that end a text: those of the settings, or else those of the configuration (raises ValueError for an id
    that is not in the vocabulary)."""
    ends = as_list(first_given(resolved.eos_token_id, config.eos_token_id))
    if not all(is_number(end, Integral, 0) and end < config.vocab_size for end in ends):
        raise ValueError(f"eos_token_id={ends} is impossible; allowed: ids below {config.vocab_size}")
    return ends


def padding_id(resolved: GenerationConfig, config: MinistralConfig, ends: Sequence[int]) -> int:
    """The id that fills up rows that have ended (raises as `ending_ids`)."""
    filler: int = first_given(resolved.pad_token_id, config.pad_token_id, *ends, 0)
    if not 0 <= filler < config.vocab_size:
        raise ValueError(f"pad_token_id={filler} is impossible; allowed: an id below {config.vocab_size}")
    return filler


def choose_copies(resolved: GenerationConfig, temperature: float, cache: KVCache | None) -> int:
    """The number of continuations of each row.

    Raises:
        ValueError: several with greedy decoding or with a cache.
    """
    copies: int = first_given(resolved.num_return_sequences, 1)
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
    resolved: GenerationConfig, tokenizer: Tokenizer | None, input_ids: Tensor, padding_mask: Tensor
) -> list[StopText]:
    """One `StopText` for each row of the prompts (B, T); [] without stop texts."""
    texts = as_list(resolved.stop_strings)
    if not texts:
        return []
    if tokenizer is None:
        raise ValueError(f"stop_strings={texts} without a tokenizer; give tokenizer=..., or stop_strings=()")
    from tokenizer import StopText, Tokenizer  # imported late: only stop texts need them

    expect_kind("tokenizer", tokenizer, Tokenizer, "the Tokenizer of this project")
    prompts = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), padding_mask)]
    return [StopText(tokenizer, texts, prompt) for prompt in prompts]
