"""The settings of one call of `generate`: arguments are checked, and those that are None get a value.

A value comes from the call, else from the model's generation_config.json (`GenerationConfig`), else from its
config.json, else from a default. `generate.resolve_sampling` does the same for the settings of `Sampling`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoint import GenerationConfig, check_setting
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


def choose_length(stored: GenerationConfig, max_new_tokens: int | None, prompt: int) -> int:
    """The number of tokens that may follow a prompt of `prompt` tokens.

    Raises:
        ValueError: not a whole number above 0, or the `max_length` of generation_config.json is below the prompt.
    """
    if max_new_tokens is None and stored.max_new_tokens is None and stored.max_length is not None:
        if stored.max_length <= prompt:
            limit = f"generation_config.json says max_length={stored.max_length}"
            cure = "give max_new_tokens, or a shorter prompt"
            raise ValueError(f"the prompt has {prompt} tokens, {limit}; {cure}")
        return stored.max_length - prompt
    length: int = first_given(max_new_tokens, stored.max_new_tokens, DEFAULT_LENGTH)
    check_setting("max_new_tokens", length)
    return length


def reserved_tokens(stored: GenerationConfig, max_new_tokens: int | None, new_tokens: int) -> int:
    """The number of new tokens, of at most `new_tokens`, that memory is set aside for."""
    if max_new_tokens is not None or stored.max_new_tokens is not None:
        return new_tokens
    return min(new_tokens, DEFAULT_LENGTH)  # a `max_length` is often the model's whole context


def ending_ids(
    given: int | Sequence[int] | None, stored: GenerationConfig, config: MinistralConfig
) -> list[int]:
    """The ids that end a text: those given, those of generation_config.json, or those of the configuration (raises
    ValueError for an id that is not in the vocabulary)."""
    ids = first_given(given, stored.eos_token_id, config.eos_token_id, ())
    expect_kind("eos_token_id", ids, (int, Collection), "an id or a list of ids")
    ends = as_list(ids)
    if not all(is_number(end, int, 0) and end < config.vocab_size for end in ends):
        raise ValueError(f"eos_token_id={ends} is impossible; allowed: ids below {config.vocab_size}")
    return ends


def padding_id(stored: GenerationConfig, config: MinistralConfig, ends: Sequence[int]) -> int:
    """The id that fills up rows that have ended (raises as `ending_ids`)."""
    filler: int = first_given(stored.pad_token_id, config.pad_token_id, *ends, 0)
    if not 0 <= filler < config.vocab_size:
        raise ValueError(f"pad_token_id={filler} is impossible; allowed: an id below {config.vocab_size}")
    return filler


def choose_copies(
    given: int | None, stored: GenerationConfig, temperature: float, cache: KVCache | None
) -> int:
    """The number of continuations of each row.

    Raises:
        ValueError: not a whole number above 0, or several with greedy decoding or with a cache.
    """
    copies: int = first_given(given, stored.num_return_sequences, 1)
    check_setting("num_return_sequences", copies)
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
    """A generator for each copy of each row; that of the n-th copy has the seed of the row plus n."""
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
            if number is None:
                generator.seed()
            else:
                generator.manual_seed((int(number) + copy) % 2**63)
            generators.append(generator)
    return generators


def make_stop_texts(
    stop_strings: str | Sequence[str] | None,
    stored: GenerationConfig,
    tokenizer: Tokenizer | None,
    input_ids: Tensor,
    padding_mask: Tensor,
) -> list[StopText]:
    """One `StopText` for each row of the prompts (B, T); [] without stop texts."""
    texts = as_list(first_given(stop_strings, stored.stop_strings, ()))
    check_setting("stop_strings", texts)
    if not texts:
        return []
    if tokenizer is None:
        raise ValueError(f"stop_strings={texts} without a tokenizer; give tokenizer=..., or stop_strings=()")
    from tokenizer import StopText  # imported late: only stop texts need it

    prompts = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), padding_mask)]
    return [StopText(tokenizer, texts, prompt) for prompt in prompts]
