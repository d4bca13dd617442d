"""Generate text: the sampling loop (`generate`, `sample`) and the command line.

    python generate.py "To be, or not to be"

runs the bundled model, a small Ministral 3 trained on Shakespeare; `--model` takes any directory or Hub id.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
from checkpoint import DTYPES, GenerationConfig, check_setting
from checks import as_padding_mask, expect_ids, expect_kind, expect_tensor, is_number, warn_of_padding
from cli import Parser, exit_code, format_bytes, setting_type
from fast import Captured, flat, wide_rows
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3ForCausalLM
from pretrained import PreTrainedConfig, at_least_float32
from tokenizer import (
    ChatStream,
    StopText,
    TextStream,
    Tokenizer,
    content_with_thinking,
    read_chat_template,
    split_thinking,
)
from vision import (
    ImageSizes,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    batch_images,
    image_tokens,
    load_image,
    preprocess,
)

BUNDLED = Path(__file__).resolve().parent / "models" / "shakespeare"
DEFAULT_LENGTH = 128  # new tokens, where nothing says how many
GenerativeModel = MinistralForCausalLM | Mistral3ForConditionalGeneration
MODELS: dict[str, type[GenerativeModel]] = {
    "ministral": MinistralForCausalLM,
    "mistral": MinistralForCausalLM,
    "llama": MinistralForCausalLM,
    "ministral3": Ministral3ForCausalLM,
    "mistral3": Mistral3ForConditionalGeneration,
}


def model_class(config: dict[str, object]) -> type[GenerativeModel]:
    """The class that computes what a config.json describes.

    Raises:
        ValueError: none does.
    """
    kind = str(config.get("model_type"))
    if kind not in MODELS:
        raise ValueError(f"config.json has model_type {config.get('model_type')!r}; allowed: {', '.join(MODELS)}")
    return MODELS[kind]


def load_model(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    **changes: Any,
) -> GenerativeModel:
    """`from_pretrained` of the class that config.json asks for; arguments and errors are those of
    `PreTrainedModel.from_pretrained`."""
    directory = checkpoint.find(path_or_hub_id, revision)
    cls = model_class(checkpoint.read_config(directory))
    return cls.from_pretrained(directory, dtype, device, attn_implementation, **changes)


# ---------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach probability p.
        min_p: keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: above 1, tokens already in the text become less likely (https://arxiv.org/abs/1909.05858).

    Filters apply in this order, after the temperature, as in Transformers. None is off; so are top_k=0 and top_p=1.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_setting(name, value)


def resolve_sampling(stored: GenerationConfig, do_sample: bool | None = None, **arguments: Any) -> Sampling:
    """How `generate` draws: each of its arguments, or, where that is None, what generation_config.json says.

    As in Transformers it is greedy unless `do_sample` is on, in the call or in the file, with a temperature of 1 unless
    that is given. Beyond Transformers, a temperature in the call decides alone: 0 is greedy, others draw.

    Raises:
        ValueError: a value outside its range, or do_sample=True with a temperature of 0.
    """
    for name, value in {"do_sample": do_sample, **arguments}.items():
        check_setting(name, value)
    values = {}
    for name, value in arguments.items():
        values[name] = getattr(stored, name) if value is None else value
    temperature = arguments["temperature"]
    if do_sample and temperature == 0:
        raise ValueError("do_sample=True with temperature=0, which is greedy; allowed: one of the two")
    if do_sample is None and temperature is not None:
        do_sample = temperature > 0
    if do_sample is None:
        do_sample = bool(stored.do_sample)
    if do_sample and values["temperature"] is None:
        values["temperature"] = 1.0
    if not do_sample:
        unused = [name for name in ("temperature", "top_k", "top_p", "min_p") if arguments[name]]
        if unused:
            warnings.warn(f"{', '.join(unused)}: no effect on greedy decoding; give do_sample=True", stacklevel=3)
        values["temperature"] = 0.0
    if values["repetition_penalty"] is None:
        values["repetition_penalty"] = 1.0
    return Sampling(**values)


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Logits (V,) with those of all tokens in ids (n,) divided by `penalty` if positive, multiplied if negative."""
    seen = logits[ids]
    return logits.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (..., V) at a temperature above 0, with those of excluded tokens at -inf."""
    # Subtracting the maximum first changes no probability and keeps tiny temperatures from overflowing; one that
    # float32 would round to 0 is raised to what is greedy anyway.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[..., -1] = False  # the most likely token always stays
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    if sampling.min_p is not None:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logits


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token from each row of logits (..., V) -> (...,). The result depends on the arguments alone."""
    logits = logits.to(at_least_float32(logits.dtype))
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = filter_logits(logits, sampling).softmax(-1)
    return torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator).view(logits.shape[:-1])


# ---------------------------------------------------------------------------------------------------- the loop


@torch.inference_mode()
def generate(
    model: GenerativeModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    prefill_chunk_size: int | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: ImageSizes | None = None,
    past_key_values: KVCache | None = None,
    on_prompt: Callable[[int, int], object] | None = None,
    fast: bool = True,
    compile: bool = False,
    do_sample: bool | None = None,
    num_return_sequences: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """Continue each row of `input_ids` until it ends with an end-of-sequence token or is long enough.

    Settings that are None are those of `model.generation_config` (the model's generation_config.json), then those of
    its configuration, then the defaults named here.

    Args:
        input_ids: (B, T). Shorter prompts are padded on the left.
        attention_mask: (B, T), 1 at text and 0 at padding; None: all is text. (A batch that is padded without a mask is
            read as text; a warning says so where it is seen by `pad_token_id`.)
        max_new_tokens: how many tokens are added at most; by default 128, or what leads to the `max_length` of
            generation_config.json. A row also ends when it fills the model's `max_position_embeddings`.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: see `resolve_sampling` and `Sampling`. Greedy
            by default. (Transformers keeps the 50 most likely tokens where nothing says `top_k`; here that is off.)
        eos_token_id: the tokens that end a row; () means none.
        seed: one number for all rows or one for each; every row draws from a generator of its own, so that it gets
            what it gets alone. None: from the system's entropy.
        num_return_sequences: how many continuations each row gets, one below the other; the n-th is what the row gets
            alone with seed + n, so they differ. More than one needs sampling.
        stop_strings, tokenizer: a row also ends with the token that completes one of these texts. The tokenizer tells
            what the tokens mean.
        on_token: called as on_token(row, id) for every new token, the ending one included, as soon as it is known;
            if it returns True, that row ends.
        prefill_chunk_size: the prompt is read in chunks of this size, so that the memory beside weights and cache does
            not grow with it; None is 512 on a CPU and 4096 elsewhere. A cut may go through a picture.
        pixel_values, image_sizes: the pictures whose [IMG] tokens are in the prompts, see `vision.batch_images`.
        past_key_values: the cache of an earlier call that holds the first tokens of every row; only the others are
            read, and the pictures are those among them. It holds all but the last token in the end.
        on_prompt: called as on_prompt(read, T) after each chunk of the prompt.
        fast: run `fast.py`'s form of the model where it computes the same function, which rounds in another order;
            False: `model(...)` itself.
        compile: let `torch.compile` fuse a decode step of fixed shapes, for long texts: it takes up to a minute in each
            call. (On CUDA such a step is recorded and replayed in any case.)

    Returns:
        (B * num_return_sequences, T + n): prompts and continuations; a row that ended early is filled up with
        `pad_token_id` (with the first end-of-sequence id where there is none).

    Raises:
        ValueError: a setting out of range, an empty or padded-on-the-right row, or a prompt that leaves no position
            of `max_position_embeddings` for a new token.
    """
    expect_model(model)
    config, device, stored = model.config.get_text_config(), model.device, model.generation_config
    sampling = resolve_sampling(stored, do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                                repetition_penalty=repetition_penalty)  # fmt: skip
    expect_kind("past_key_values", past_key_values, KVCache, "a KVCache of ministral.py")
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    chunk = prefill_chunk_size if prefill_chunk_size is not None else 512 if device.type == "cpu" else 4096
    if not is_number(chunk, int, 1):
        raise ValueError(f"prefill_chunk_size={chunk!r} is impossible; allowed: a whole number not below 1")
    expect_ids(input_ids, config.vocab_size)  # for the fast path, which asks no more
    warn_of_padding(input_ids, attention_mask, config, ends=True)
    if past_key_values is not None:
        past_key_values.key_positions(config, 1, device)  # refuses the cache of another configuration
    input_ids = input_ids.to(device)
    B, T = input_ids.shape
    if past >= T:
        raise ValueError(f"past_key_values holds {past} tokens of {T}; allowed: fewer, the last one has to be read")
    real = torch.ones(B, T, dtype=torch.bool)
    if attention_mask is not None:
        real = as_padding_mask(attention_mask, B, T).cpu()
    if not real[:, -1].all():
        raise ValueError(f"attention_mask must be {(B, T)}, padding on the left: every row ends with a real token")
    lengths = real.sum(1).tolist()
    check_length(max(lengths), config)
    length_given = max_new_tokens is not None or stored.max_new_tokens is not None
    max_new_tokens = min(choose_length(stored, max_new_tokens, T), config.max_position_embeddings - min(lengths))
    total = T + max_new_tokens
    # A `max_length` is often the model's whole context: no memory is set aside for that.
    expected = total if length_given else min(total, T + DEFAULT_LENGTH)
    ends = ending_ids(eos_token_id, stored, config)
    filler = padding_id(stored, config, ends)

    embeds = None
    if pixel_values is not None:
        expect_tensor("pixel_values", pixel_values)
    if isinstance(model, Mistral3ForConditionalGeneration) and pixel_values is not None:
        embeds, _ = model.model.embed(input_ids[:, past:], pixel_values.to(device), image_sizes)
    elif pixel_values is not None:
        raise ValueError(f"pixel_values for a {type(model).__name__}, a text model; allowed: a mistral3 model")

    copies = first_given(num_return_sequences, stored.num_return_sequences, 1)
    check_setting("num_return_sequences", copies)
    generators = _generators(seed, B, copies, device)
    if copies > 1:
        if sampling.temperature == 0 or past_key_values is not None:
            found = "past_key_values" if past_key_values is not None else "greedy decoding, which has one result"
            raise ValueError(f"num_return_sequences={copies} with {found}; allowed: sampling, without a cache")
        B, lengths = B * copies, [length for length in lengths for _ in range(copies)]
        input_ids, real = input_ids.repeat_interleave(copies, 0), real.repeat_interleave(copies, 0)
        embeds = None if embeds is None else embeds.repeat_interleave(copies, 0)
    stops = _stop_texts(first_given(stop_strings, stored.stop_strings, ()), tokenizer, input_ids, real)

    # Positions skip padding, so a padded row is rotated, and its queries are scaled, as if it were alone.
    mask = None if real.all() else torch.cat((real, torch.ones(B, max_new_tokens, dtype=torch.bool)), 1).to(device)
    first_positions = torch.tensor([[length - T] for length in lengths], device=device)

    forward = flat(model) if fast else None
    if compile and forward is None:
        raise ValueError("compile=True needs the fast path; allowed: with fast=True, 'sdpa', and a model in eval mode")

    def step(start: int, ids: Tensor) -> Tensor:
        """Feed ids (B, S) that begin at slot `start`; the logits after the last of them, (B, V)."""
        end = start + ids.shape[1]
        positions = (first_positions + torch.arange(start, end, device=device)).clamp(min=0)
        seen = None if mask is None else mask[:, :end]
        pictured = None if embeds is None or start >= T else embeds[:, start - past : end - past]
        if forward is not None:
            return forward(ids if pictured is None else pictured, positions, cache, seen)
        text = {"input_ids": ids} if pictured is None else {"inputs_embeds": pictured}
        arguments = dict(attention_mask=seen, position_ids=positions, past_key_values=cache, **text)
        return model(**arguments, use_cache=True, logits_to_keep=1).logits[:, -1]

    cache, tokens = KVCache(config, expected) if past_key_values is None else past_key_values, input_ids
    for start in range(past, T, chunk):
        logits = step(start, input_ids[:, start : start + chunk])
        if on_prompt is not None:
            on_prompt(min(start + chunk, T), T)
    captured = None
    record = compile or (device.type == "cuda" and expected == total)
    if forward is not None and record and total > T + 1:
        captured = Captured(forward, cache, total, first_positions, mask, compile)
    running = [True] * B
    for slot in range(T, total):
        new = torch.full((B, 1), filler, dtype=tokens.dtype, device=device)
        for row in (row for row in range(B) if running[row]):
            scores = logits[row]
            if sampling.repetition_penalty != 1:
                said = torch.cat((tokens[row, :T][real[row].to(device)], tokens[row, T:]))
                scores = scores.to(at_least_float32(scores.dtype))
                scores = penalize_repetition(scores, said, sampling.repetition_penalty)
            new[row] = sample(scores, sampling, generators[row])
        tokens = torch.cat((tokens, new), dim=1)
        for row, token in enumerate(new[:, 0].tolist()):
            if running[row]:
                stop = on_token(row, token) if on_token else False
                stop = stops[row].push(token) or stop if stops else stop
                full = lengths[row] + tokens.shape[1] - T >= config.max_position_embeddings
                running[row] = not (stop or full or token in ends)
        if not any(running) or slot + 1 == total:
            break
        logits = step(slot, new) if captured is None else captured(new)
    return tokens


def expect_model(model: Any) -> None:
    """Raise ValueError unless that is a language model of this project (or a wrapper that shows its attributes)."""
    found = type(model).__name__
    if isinstance(model, (str, Path)):
        raise ValueError(f"model must be a loaded model; found a name: give load_model({str(model)!r})")
    if not isinstance(getattr(model, "config", None), PreTrainedConfig) or not hasattr(model, "lm_head"):
        supported = "; ".join(sorted({cls.__name__ for cls in MODELS.values()}))
        raise ValueError(f"model must be one that load_model returns ({supported}); found {found}")


def first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


def as_list(value: Any) -> list[Any]:
    """[] for None, [value] for one value, a list for several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def ending_ids(given: int | Sequence[int] | None, stored: GenerationConfig, config: MinistralConfig) -> list[int]:
    """The ids that end a text: those given, those of generation_config.json, or those of the configuration (raises
    ValueError for an id that is not in the vocabulary)."""
    found = first_given(given, stored.eos_token_id, config.eos_token_id, ())
    expect_kind("eos_token_id", found, (int, Collection), "an id or a list of ids")
    ends = as_list(found)
    if not all(is_number(end, int, 0) and end < config.vocab_size for end in ends):
        raise ValueError(f"eos_token_id={ends} is impossible; allowed: ids below {config.vocab_size}")
    return ends


def padding_id(stored: GenerationConfig, config: MinistralConfig, ends: Sequence[int]) -> int:
    """The id that fills up rows that have ended (raises as `ending_ids`)."""
    filler: int = first_given(stored.pad_token_id, config.pad_token_id, *ends, 0)
    if not 0 <= filler < config.vocab_size:
        raise ValueError(f"pad_token_id={filler} is impossible; allowed: an id below {config.vocab_size}")
    return filler


def choose_length(stored: GenerationConfig, max_new_tokens: int | None, prompt: int) -> int:
    """How many tokens may follow a prompt of that many.

    Raises:
        ValueError: no whole number above 0, or the `max_length` of generation_config.json is below the prompt.
    """
    if max_new_tokens is None and stored.max_new_tokens is None and stored.max_length is not None:
        if stored.max_length <= prompt:
            limit = f"generation_config.json says max_length={stored.max_length}"
            raise ValueError(f"the prompt has {prompt} tokens, {limit}; give max_new_tokens, or a shorter prompt")
        return stored.max_length - prompt
    length: int = first_given(max_new_tokens, stored.max_new_tokens, DEFAULT_LENGTH)
    check_setting("max_new_tokens", length)
    return length


def _stop_texts(
    stop_strings: str | Sequence[str], tokenizer: Tokenizer | None, input_ids: Tensor, real: Tensor
) -> list[StopText]:
    """One StopText for each row, none without stop texts."""
    texts = as_list(stop_strings)
    check_setting("stop_strings", texts)
    if not texts:
        return []
    if tokenizer is None:
        raise ValueError(f"stop_strings={texts} without a tokenizer; give tokenizer=..., or stop_strings=()")
    return [StopText(tokenizer, texts, ids[kept].tolist()) for ids, kept in zip(input_ids.cpu(), real)]


def check_length(tokens: int, config: MinistralConfig) -> None:
    """Raise ValueError if a prompt of that many tokens leaves no position for a new one."""
    limit = config.max_position_embeddings
    if tokens >= limit:
        raise ValueError(f"the prompt has {tokens} tokens; allowed: below max_position_embeddings={limit}; shorten it")


def _generators(
    seed: int | Sequence[int] | None, rows: int, copies: int, device: torch.device
) -> list[torch.Generator]:
    """A generator for each copy of each row; that of the n-th copy has the seed of the row plus n."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * rows
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


# ---------------------------------------------------------------------------------------------- conversations


def read_picture(source: Any, config: Mistral3Config, tokenizer: Tokenizer) -> tuple[Tensor, list[int]]:
    """A picture, preprocessed (3, height, width), and the ids that stand for it in a prompt.

    Raises:
        ValueError: the tokenizer has no such tokens, or the model means another id by [IMG]; as `load_image`.
    """
    picture = preprocess(load_image(source), config)
    names = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    image, between, end = (tokenizer.special_tokens.get(name) for name in names)
    if between is None or end is None or image != config.image_token_id:
        found = ", ".join(f"{name} {tokenizer.special_tokens.get(name)}" for name in names)
        raise ValueError(f"the tokenizer has {found}; allowed: these three, [IMG] being {config.image_token_id}")
    return picture, image_tokens((picture.shape[1], picture.shape[2]), config, between, end)


def batched(pictures: Sequence[Tensor]) -> tuple[Tensor | None, ImageSizes | None]:
    """pixel_values and image_sizes for `generate`, None without pictures."""
    return batch_images(pictures) if pictures else (None, None)


class Conversation:
    """Messages (see `Tokenizer.encode_chat`), and the KV cache of their beginning, which is kept between answers: only
    what is new is read (unless a sliding window has moved on and the beginning has changed).

    Attributes:
        messages: may be changed between answers; the cache is cut back to what still is the beginning.
        tools: see `Tokenizer.encode_chat`.
        pictures: source -> (pixels, ids) of what was loaded from files and addresses; each is read once.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: Any, messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.config, self.messages, self.tools = tokenizer, config, list(messages), tools
        self.pictures: dict[str, tuple[Tensor, list[int]]] = {}
        self._cache: KVCache | None = None
        self._held: list[int] = []  # the ids whose keys are in the cache
        self._seen: list[Tensor] = []  # the pictures among them

    def picture(self, source: Any) -> tuple[Tensor, list[int]]:
        """See `read_picture`."""
        if not isinstance(self.config, Mistral3Config):
            found = f"an image, for a text model (model_type {self.config.model_type!r})"
            raise ValueError(f"{found}; give a model that sees images (model_type 'mistral3')")
        if not isinstance(source, str):
            return read_picture(source, self.config, self.tokenizer)
        if source not in self.pictures:
            self.pictures[source] = read_picture(source, self.config, self.tokenizer)
        return self.pictures[source]

    def encode(self) -> tuple[list[int], list[Tensor]]:
        """The ids of the conversation up to where the answer begins, and its pictures (raises as `encode_chat` and
        `read_picture`)."""
        pictures: list[Tensor] = []

        def encode_image(source: Any) -> list[int]:
            pixels, ids = self.picture(source)
            pictures.append(pixels)
            return ids

        return self.tokenizer.encode_chat(self.messages, self.tools, encode_image), pictures

    def _keep(self, ids: list[int], pictures: list[Tensor]) -> tuple[KVCache, int]:
        """The cache of what `ids` and the ids that were read before have in common, and how many pictures it holds."""
        cache, self._cache = self._cache, None  # given back when the answer is there
        if cache is None:
            return KVCache(self.config), 0
        same = min(len(ids) - 1, len(self._held))
        same = next((place for place in range(same) if ids[place] != self._held[place]), same)
        names = self.tokenizer.special_tokens
        inside = {names.get(name) for name in ("[IMG]", "[IMG_BREAK]", "[IMG_END]")}
        kept = place = 0
        for picture, old in zip(pictures, self._seen):  # equal ids, but another picture?
            place = next(i for i in range(place, len(ids)) if ids[i] in inside)
            end = ids.index(names["[IMG_END]"], place) + 1
            if end > same or not (picture is old or torch.equal(picture, old)):
                same = min(same, place)
                break
            kept, place = kept + 1, end
        else:
            if kept < len(pictures):
                same = min(same, next(i for i in range(place, len(ids)) if ids[i] in inside))
        try:
            cache.crop(same)
        except ValueError:  # a window has moved on
            return KVCache(self.config), 0
        return cache, kept

    def answer(self, model: GenerativeModel, **settings: Any) -> dict[str, Any]:
        """Let the model answer, and append the answer, as `Tokenizer.decode_chat` gives it, to the messages: a message
        with "prefix" becomes the beginning of it, and an empty answer is not appended.

        Args:
            settings: those of `generate`.
        """
        ids, pictures = self.encode()
        cache, kept = self._keep(ids, pictures)
        pixel_values, image_sizes = batched(pictures[kept:])
        tokens = generate(model, torch.tensor([ids]), pixel_values=pixel_values, image_sizes=image_sizes,
                          past_key_values=cache, **settings)[0].tolist()  # fmt: skip
        self._cache, self._held, self._seen = cache, tokens[: cache.get_seq_length()], pictures
        message = self.tokenizer.decode_chat(tokens[len(ids) :], self.begins_with())
        if self.messages[-1].get("prefix"):
            begun = self.messages.pop()
            message["content"] = _join(content_with_thinking(begun), message["content"])
            for key in ("tool_calls", "malformed_calls"):
                if calls := [*(begun.get(key) or ()), *message.get(key, ())]:
                    message[key] = calls
        if message["content"] or message.get("tool_calls") or message.get("malformed_calls"):
            self.messages.append(dict(message))
        return message

    def begins_with(self) -> str:
        """What kind of text the answer begins with: "thinking" if the last message is a prefix that ends in it."""
        last: Any = self.messages[-1].get("content") if self.messages[-1].get("prefix") else None
        part = last[-1] if isinstance(last, (list, tuple)) and last else {}
        return "thinking" if part.get("type") == "thinking" and not part.get("closed", True) else "text"


def _join(begun: Any, rest: Any) -> Any:
    """The content of a message from what was given of it and what the model added."""
    if isinstance(begun, str) and isinstance(rest, str):
        return begun + rest
    parts, more = (
        [{"type": "text", "text": c}] * bool(c) if isinstance(c, str) else list(c or ()) for c in (begun, rest)
    )
    if parts and more and parts[-1]["type"] == more[0]["type"] == "thinking" and not parts[-1].get("closed", True):
        thought = parts.pop()["thinking"]
        thought = thought if isinstance(thought, str) else "".join(part["text"] for part in thought)
        more[0] = more[0] | {"thinking": thought + more[0]["thinking"]}
    if parts and more and parts[-1]["type"] == more[0]["type"] == "text":  # apart, a line between
        more[0] = {"type": "text", "text": parts.pop()["text"] + more[0]["text"]}
    return parts + more


def encode_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, config: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Tensor, Tensor | None, ImageSizes | None]:  # fmt: skip
    """A conversation, with pictures from files, web addresses or `data:` URIs, as `generate` takes it: input_ids
    (1, T), pixel_values and image_sizes (None without pictures). Raises as `Conversation.encode`."""
    ids, pictures = Conversation(tokenizer, config, messages, tools).encode()
    return torch.tensor([ids]), *batched(pictures)


# ------------------------------------------------------------------------------------------------ command line


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line (None: of this process)."""
    parser = Parser(description="Continue a text, or answer, with a Ministral model.")
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the text to continue, which is printed first, or the"
        " user's message")  # fmt: skip
    add("--prompt-file", metavar="FILE", help="read the prompt from a file, - for standard input")
    add("--image", action="append", default=[], metavar="FILE", help="a picture, before the text; also a web address"
        " or data: URI (repeatable)")  # fmt: skip
    add("--model", default=str(BUNDLED), metavar="DIR_OR_HUB_ID", help="default: the bundled model")
    add("--revision", metavar="NAME", help="branch, tag or commit of a Hub id")
    add("--raw", action="store_true", help="continue the plain text, no chat format")
    add("--chat", action="store_true", help="a conversation in the terminal; /help lists its commands")
    add("--system", metavar="TEXT_OR_FILE", help="the system prompt; in a file, [THINK]...[/THINK] is thinking, and"
        " {name}, {today}, {yesterday} are filled in")  # fmt: skip
    add("--messages", metavar="FILE.json", help="answer a conversation: a list of messages with role and content")
    add("--tools", metavar="FILE.json", help="tools the model may call; its calls are printed as JSON")
    add("--show-thinking", action="store_true", help="print what the model thinks before it answers")
    defaults = parser.add_argument_group(
        "how tokens are drawn", "default: the model's generation_config.json, then Mistral's advice for such a model"
    )
    for name, letter, text in (
        ("max_new_tokens", "N", "then 200; for chats 16384, with thinking 32768, or what memory allows"),
        ("temperature", "T", "0 is greedy, higher is more random"),
        ("top_k", "K", "draw from the K most likely tokens; 0: from all"),
        ("top_p", "P", "draw from the most likely tokens that make up P"),
        ("min_p", "P", "drop tokens below P times the most likely one"),
        ("repetition_penalty", "X", "above 1: repeat less"),
        ("seed", "N", "the same seed draws the same text; default: a new one each time"),
    ):
        defaults.add_argument(f"--{name.replace('_', '-')}", type=setting_type(name), metavar=letter, help=text)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)",
        type=setting_type("stop_strings"))  # fmt: skip
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="default: as stored; FP8 becomes bfloat16")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--attn", choices=("sdpa", "eager"), default="sdpa", help="attention implementation")
    add("--json", action="store_true", help="print one JSON object with text, ids, settings, timing")
    return parser.parse_args(arguments)


def read_prompt(options: argparse.Namespace) -> str | None:
    """The prompt, from the command line, a file or standard input; None where a conversation needs none.

    Raises:
        ValueError: none, two, an empty one, or one that is not UTF-8.
        OSError: the file cannot be read.
    """
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError(f"a PROMPT and --prompt-file {options.prompt_file}; give one of the two")
    if options.prompt is None and options.prompt_file is None:
        if options.chat or options.messages:
            return None
        raise ValueError('no prompt; give a text to continue, as in `python generate.py "To be, or not to be"`, or'
                         " --prompt-file FILE, or --chat (--help lists the options)")  # fmt: skip
    if options.prompt is not None:
        data = os.fsencode(options.prompt)
    elif options.prompt_file == "-":
        data = sys.stdin.buffer.read()
    else:
        data = read_file(options.prompt_file, "--prompt-file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {error}") from error
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def read_file(path: str, option: str) -> bytes:
    """The content of the file that an option names (raises OSError, which names the option)."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise OSError(f"{option} {path or repr(path)}: {error.strerror}; give a file that can be read") from error


def choose_device(name: str) -> torch.device:
    """The device of that name, or the best there is for "auto".

    Raises:
        ValueError: this machine has no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if not there[name]:
        present = ", ".join(kind for kind, is_there in there.items() if is_there)
        raise ValueError(f"--device {name}: this machine has none; give {present}, or leave it out")
    return torch.device(name)


def kv_cache_bytes(config: MinistralConfig, tokens: int, bytes_per_number: int) -> int:
    """Bytes that the keys and values of a text of `tokens` tokens take; sliding layers keep a window of it."""
    window = config.sliding_window or tokens
    kept = sum(min(tokens, window) if kind == "sliding_attention" else tokens for kind in config.layer_types)
    return 2 * kept * config.num_key_value_heads * config.head_dim * bytes_per_number


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, within the limit of the control group; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS has no such file; all of its memory is the best that can be said
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control groups, or "max"
        return free
    return min(free, limit)


def progress_bar() -> Callable[[int, int], object]:
    """An `on_prompt` that draws a bar on standard error for prompts that take longer than two seconds."""
    from tqdm import tqdm  # imported late: a short prompt needs none

    bar: Any = None

    def show(read: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, desc="reading", unit=" tokens", delay=2, leave=False, file=sys.stderr)
        bar.update(read - bar.n)
        if read == total:
            bar.close()

    return show


class Writer:
    """Prints text as its tokens arrive, whole characters only, and nothing from a stop text on. Of a chat's answer it
    prints the words, and the thinking if it is to be shown; tool calls are read at the end.

    Attributes:
        text: what was written so far, without thinking.
        cut: whether a stop text ended it.
        ids, times: the new tokens, and when each came.
        stopped: ends the text before the next token; set by a stop text, or by somebody else.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], print_now: bool, chat: str | None = None,
        thinking: bool = False,
    ) -> None:  # fmt: skip
        self.stream: TextStream | ChatStream = TextStream(tokenizer) if chat is None else ChatStream(tokenizer, chat)
        self.stops, self.print_now, self.thinking = [s for s in stops if s], print_now, thinking
        self.text, self.shown, self.stopped, self.cut, self.aside = "", 0, False, False, False
        self.ids: list[int] = []
        self.times: list[float] = []

    def on_token(self, row: int, token: int) -> bool:
        self.ids.append(token)
        self.times.append(time.perf_counter())
        self._take(self.stream.push(token))
        return self.stopped

    def close(self) -> None:
        if not self.stopped:
            self._take(self.stream.close(), last=True)
        self._show_thinking(False)

    def _take(self, found: str | tuple[str, str], last: bool = False) -> None:
        kind, piece = found if isinstance(found, tuple) else ("text", found)
        if kind == "text" and (piece or last):
            self._show_thinking(False)
            self._add(piece, last)
        elif kind == "thinking" and piece and self.thinking and self.print_now:
            self._show_thinking(True)
            sys.stdout.write(piece)
            sys.stdout.flush()

    def _show_thinking(self, on: bool) -> None:
        """Begin or end thinking on the screen: dim on a terminal, between markers elsewhere."""
        if on != self.aside:
            marks = ("\x1b[2m", "\x1b[0m\n\n") if sys.stdout.isatty() else ("[THINK]", "[/THINK]\n")
            sys.stdout.write(marks[not on])
            self.aside = on

    def _add(self, piece: str, last: bool = False) -> None:
        self.text += piece
        found = [place for place in (self.text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.text, self.stopped, self.cut = self.text[: min(found)], True, True
        ready = len(self.text)
        if not (self.stopped or last):  # the end of the text may be the beginning of a stop text
            lengths = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
            ready -= max(lengths, default=0)
        if self.print_now and ready > self.shown:
            sys.stdout.write(self.text[self.shown : ready])
            sys.stdout.flush()
        self.shown = max(self.shown, ready)


def choose_format(options: argparse.Namespace, directory: Path) -> tuple[bool, str]:
    """Whether the prompt is a message of a chat, and why: what the options say, else the name of the model, else
    whether a template for chats lies beside it."""
    asked = [f"--{name}" for name in ("chat", "messages", "system", "tools") if getattr(options, name)]
    if options.raw and asked:
        raise ValueError(f"--raw and {asked[0]}: plain text has no messages; allowed: one of the two")
    if options.raw or asked:
        return not options.raw, (asked or ["--raw"])[0]
    return knows_chats(options.model, directory)


def knows_chats(model: str, directory: Path) -> tuple[bool, str]:
    """Whether a model was trained for chats, and why: what its name says, else the files beside it."""
    words = model_words(model, directory)
    for word, chat in (("base", False), ("instruct", True), ("reasoning", True)):
        if word in words:
            return chat, f"the name says {word}"
    template = read_chat_template(directory)
    if template is not None:
        return True, f"{template[0]} has a chat template"
    if (directory / "SYSTEM_PROMPT.txt").is_file():
        return True, "SYSTEM_PROMPT.txt is there"
    return False, "the model continues the prompt; neither its name nor its files tell of chats (--chat tries one)"


def model_words(name: str, directory: Path) -> list[str]:
    """The words of a model's name: of its Hub id without the owner, or its directory; in the Hub's cache
    (.../models--owner--name/snapshots/commit) of the id that the directory belongs to."""
    parts = directory.resolve().parts if Path(name).expanduser().is_dir() else (name.rpartition("/")[2],)
    name = parts[-3].rpartition("--")[2] if "snapshots" in parts[-2:-1] else parts[-1]
    return re.split("[^a-z0-9]+", name.lower())


def system_prompt(text_or_file: str, model: str) -> Any:
    """The content of a system message: the text itself; of a file its text, in which [THINK]...[/THINK] is thinking and
    {name}, {today}, {yesterday} are filled in, as Mistral's prompts want it."""
    path = os.path.expanduser(text_or_file)
    if not os.path.isfile(path):
        return text_or_file
    today = datetime.date.today()
    text, name = Path(path).read_text(encoding="utf-8"), Path(model).resolve().name
    for key, value in (("name", name), ("today", today), ("yesterday", today - datetime.timedelta(days=1))):
        text = text.replace(f"{{{key}}}", str(value))
    return split_thinking(text)


def begin(options: argparse.Namespace, directory: Path, prompt: str | None) -> list[Any]:
    """The messages that a chat begins with: those of --messages, the prompt with its pictures, and a system prompt:
    --system, or the repository's SYSTEM_PROMPT.txt where that shows how to think; without it, Reasoning models do not.

    Raises:
        ValueError: two system prompts, or no list of messages.
    """
    messages = read_list(options.messages, "--messages") if options.messages else []
    system = next((m for m in messages if isinstance(m, dict) and m.get("role") == "system"), None)
    file = directory / "SYSTEM_PROMPT.txt"
    if options.system is not None and system is not None:
        raise ValueError("--system, and --messages with a system message; allowed: one of the two")
    if options.system:
        messages.insert(0, {"role": "system", "content": system_prompt(options.system, options.model)})
    elif options.system is None and system is None and file.is_file() and "[THINK]" in file.read_text(encoding="utf-8"):
        print(f"system prompt: {file} (--system gives another)", file=sys.stderr)
        messages.insert(0, {"role": "system", "content": system_prompt(str(file), options.model)})
    parts: list[dict[str, Any]] = [{"type": "image", "image": source} for source in options.image]
    if parts or prompt is not None:
        parts += [] if prompt is None else [{"type": "text", "text": prompt}]
        messages.append({"role": "user", "content": parts})
    return messages


def kind_of(options: argparse.Namespace, directory: Path, config: Any, messages: Sequence[Any]) -> str:
    """Which of ADVICE fits a chat."""
    if config.model_type not in ("ministral3", "mistral3"):
        return "chat"
    contents = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "system"]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    thinks = "reasoning" in model_words(options.model, directory) or any(p.get("type") == "thinking" for p in parts)
    return "reasoning" if thinks else "instruct"


def read_list(path: str, option: str) -> list[Any]:
    """A JSON list from a file (raises ValueError, OSError)."""
    try:
        content = json.loads(read_file(path, option))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} {path} is not JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{option} {path} holds {type(content).__name__}; allowed: a JSON list")
    return content


# Temperature, top_p, new tokens at most: Mistral's advice for the Instruct and Reasoning models of Ministral 3, as
# Unsloth's guide to them gives it. For others none is known.
ADVICE: dict[str, tuple[float, float | None, int]] = {
    "text": (0.8, None, 200), "chat": (0.8, None, 16384), "instruct": (0.15, None, 16384),
    "reasoning": (0.7, 0.95, 32768),
}  # fmt: skip


def choose_sampling(
    options: argparse.Namespace, kind: str, stored: GenerationConfig
) -> tuple[Sampling, int, dict[str, str]]:
    """How tokens are drawn, how many at most, and where each setting comes from: the options, else the model's
    generation_config.json, else Mistral's advice for this kind of model."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    file = {name: getattr(stored, name) for name in names if getattr(stored, name) is not None}
    if stored.do_sample is False:
        file["temperature"] = 0.0
    elif stored.do_sample:
        file.setdefault("temperature", 1.0)  # as in Transformers
    advice = dict(zip(("temperature", "top_p", "max_new_tokens"), ADVICE[kind]))
    if "temperature" in given or "temperature" in file:
        advice["top_p"] = None  # the advised one belongs to the advised temperature
    values: dict[str, Any] = {**advice, **file, **given}
    sources = {name: "default" for name in advice} | {name: checkpoint.GENERATION for name in file}
    sources |= {name: option_name(name) for name in given}
    if values["temperature"] == 0:
        for name in ("top_k", "top_p", "min_p"):
            if given.get(name):
                greedy = f"temperature 0 ({sources['temperature']}) always takes the most likely token"
                warnings.warn(f"{option_name(name)} {given[name]} changes nothing: {greedy}", stacklevel=2)
            values.pop(name, None)
    budget = values.pop("max_new_tokens")
    return Sampling(**values), budget, sources


def option_name(setting: str) -> str:
    """top_p -> --top-p"""
    return "--" + setting.replace("_", "-")


def describe_settings(sampling: Sampling, budget: int, sources: Mapping[str, str]) -> str:
    """One line: how tokens are drawn, how many at most, and where each setting comes from."""
    off = {"top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    said = []
    for name, value in asdict(sampling).items():
        if value is not None and value != off.get(name):
            said.append(f"{option_name(name).removeprefix('--')} {value} ({sources[name]})")
    said.append(f"{budget:,} new tokens at most ({sources['max_new_tokens']})")
    return f"settings: {', '.join(said)}"


def run(options: argparse.Namespace) -> int:
    """The command: read everything, plan, load, generate, print. Returns the exit code; raises what `main` turns into
    one line."""
    prompt, device, dtype = read_prompt(options), choose_device(options.device), DTYPES.get(options.dtype)
    if options.chat and options.json:
        raise ValueError("--chat and --json: a conversation is no single object; give one of the two")
    if not options.model:
        raise ValueError("--model '' names no model; give a directory or a Hub id, or leave it out")
    if options.revision is not None and os.path.isdir(os.path.expanduser(options.model)):
        raise ValueError(f"--revision {options.revision}: {options.model} is a directory; it goes with a Hub id only")
    directory = checkpoint.find(options.model, options.revision)
    content = checkpoint.read_config(directory)
    cls = model_class(content)
    config = cls.config_class.from_dict(content)
    tokenizer = Tokenizer.from_dir(directory)
    ids_there = config.get_text_config().vocab_size
    if tokenizer.vocab_size > ids_there:
        raise ValueError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={ids_there}")
    stored = GenerationConfig.from_pretrained(directory)
    ends = ending_ids(None, stored, config.get_text_config())
    if options.image and not isinstance(config, Mistral3Config):
        seen = f"{options.model} is a text model (model_type {config.model_type!r})"
        raise ValueError(f"--image {options.image[0]}: {seen}; give a --model that sees images (model_type 'mistral3')")
    chat, why = choose_format(options, directory)
    if options.show_thinking and not chat:
        raise ValueError("--show-thinking: plain text has no thinking; give --chat or --system, too, or leave it out")
    if chat:
        tokenizer.check_layout()
    talk = Conversation(tokenizer, config, begin(options, directory, prompt) if chat else [],
                        read_list(options.tools, "--tools") if options.tools else None)  # fmt: skip
    untrained = chat and not knows_chats(options.model, directory)[0]
    kind = kind_of(options, directory, config, talk.messages) if chat and not untrained else "text"
    sampling, budget, sources = choose_sampling(options, kind, stored)
    if chat:
        ids, pictures = check_chat(talk) if options.chat else talk.encode()
    else:
        found = [talk.picture(source) for source in options.image]
        ids = tokenizer.encode("") + [i for _, tokens in found for i in tokens]
        ids += tokenizer.encode(prompt or "", bos=False)
        pictures = [pixels for pixels, _ in found]
    check_length(len(ids), config.get_text_config())
    print(f"{f'chat format {tokenizer.version}' if chat else 'plain text'}: {why}", file=sys.stderr)
    if untrained:
        print(f"warning: {why} for {options.model}: neither its name nor its files tell of training for chats; expect"
              " answers that make no sense", file=sys.stderr)  # fmt: skip
    if sources["max_new_tokens"] == "default" and stored.max_length is not None:
        budget = min(budget, choose_length(stored, None, len(ids)))
    room = config.get_text_config().max_position_embeddings - len(ids)
    too_many = options.max_new_tokens is not None and budget > room
    budget = plan_memory(directory, config, len(ids), budget, options.max_new_tokens is None, device, dtype)
    if too_many:
        context = f"the context of {room + len(ids):,} tokens leaves room for {room:,} after the prompt"
        print(f"note: --max-new-tokens {options.max_new_tokens}: {context}", file=sys.stderr)
    print(describe_settings(sampling, budget, sources), file=sys.stderr)
    model = cls.from_pretrained(directory, dtype, device, options.attn)
    options.stop = options.stop or as_list(stored.stop_strings)
    model.generation_config.stop_strings = None  # `Writer` looks after them
    model.generation_config.num_return_sequences = None
    settings = asdict(sampling) | {"max_new_tokens": budget}
    rows = wide_rows(model.dtype, model.device)
    if rows <= len(ids) or (options.chat and rows < math.inf):
        kind = str(model.dtype).removeprefix("torch.")
        print(f"{rows} tokens or more at once are computed in float32, faster here than {kind}", file=sys.stderr)
    if options.chat:
        return converse(talk, model, options, settings | {"eos_token_id": ends})

    settings |= {"seed": int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed}
    begun = talk.begins_with() if chat else None
    writer = Writer(tokenizer, options.stop, not options.json, begun, options.show_thinking)
    start, interrupted, message = time.perf_counter(), False, None
    try:
        if chat:
            message = talk.answer(model, on_token=writer.on_token, on_prompt=progress_bar(), **settings)
        else:
            pixel_values, image_sizes = batched(pictures)
            if not options.json:
                print(prompt or "", end="", flush=True)
            generate(model, torch.tensor([ids]), on_token=writer.on_token, on_prompt=progress_bar(),
                     pixel_values=pixel_values, image_sizes=image_sizes, **settings)  # fmt: skip
    except KeyboardInterrupt:
        interrupted = True
        message = tokenizer.decode_chat(writer.ids, begun) if begun else None
    writer.close()
    cut_message(message, writer)
    said = {"model": str(directory), "device": str(device), "dtype": str(model.dtype).removeprefix("torch.")}
    timing = measure(writer, start)
    if options.json:
        result: dict[str, object] = {"prompt": prompt, "images": options.image, "text": writer.text}
        result |= {"message": message} if chat else {}
        result |= {"prompt_ids": ids, "ids": writer.ids}
        result |= {"settings": said | {"attn": options.attn} | settings | {"stop": options.stop}}
        print(json.dumps(result | {"timing": timing, "interrupted": interrupted}, ensure_ascii=False))
    else:
        print(flush=True)
        report_calls(message)
    print(
        f"{len(writer.ids)} tokens, {timing['tokens_per_second']:.1f} tokens/s, {', '.join(said.values())},"
        f" seed {settings['seed']}" + (", interrupted" if interrupted else ""),
        file=sys.stderr,
    )
    return 130 if interrupted else 0


def check_chat(talk: Conversation) -> tuple[list[int], list[Tensor]]:
    """The ids and pictures that a conversation in the terminal begins with; its messages and tools are checked as if
    the next message were there (raises as `Conversation.encode`)."""
    if not awaits_user(talk.messages):
        return talk.encode()
    results = [{"role": "tool", "content": "", "tool_call_id": call.get("id")} for call in open_calls(talk.messages)]
    rest: list[dict[str, Any]] = results or [{"role": "user", "content": "?"}]
    probe = Conversation(talk.tokenizer, talk.config, [*talk.messages, *rest], talk.tools)
    ids, pictures = probe.encode()
    talk.pictures = probe.pictures
    return ids, pictures


def cut_message(message: Any, writer: Writer) -> None:
    """Leave out of an answer what a stop text has cut off on the screen."""
    if message is not None and writer.cut:
        thoughts = [part for part in message["content"] if isinstance(part, dict) and part["type"] == "thinking"]
        message["content"] = [*thoughts, {"type": "text", "text": writer.text}] if thoughts else writer.text


def measure(writer: Writer, start: float) -> dict[str, float | None]:
    """Seconds to the first token and to the last, and tokens per second."""
    seconds = (writer.times[-1] if writer.times else time.perf_counter()) - start
    first = writer.times[0] - start if writer.times else None
    return {"first_token_seconds": first, "seconds": seconds, "tokens_per_second": len(writer.ids) / max(seconds, 1e-9)}


def report_calls(message: Mapping[str, Any] | None) -> None:
    """Print the tool calls of an answer as one line of JSON; what is malformed goes to standard error."""
    if message and "tool_calls" in message:
        print(json.dumps(message["tool_calls"], ensure_ascii=False), flush=True)
    for call in (message or {}).get("malformed_calls", ()):
        print(f"malformed tool call {call['text']!r}: {call['error']}", file=sys.stderr)


def awaits_user(messages: Sequence[Any]) -> bool:
    """Whether it is the user's turn, or that of a tool."""
    last = messages[-1] if messages and isinstance(messages[-1], dict) else {}
    answered = last.get("role") not in ("user", "tool") and not last.get("prefix")
    return answered or (last.get("role") == "tool" and bool(open_calls(messages)))


def open_calls(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The tool calls of the last answer that have no result yet; none where they are not calls."""
    known = [message if isinstance(message, dict) else {} for message in messages]
    results = 0
    while results < len(known) and known[-1 - results].get("role") == "tool":
        results += 1
    calls = known[-1 - results].get("tool_calls") if results < len(known) else None
    whole = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    )
    return list(calls)[results:] if whole and calls else []


def take_back(messages: list[Any]) -> None:
    """Remove what has got no answer, and calls without results."""
    while messages and (not awaits_user(messages) or open_calls(messages)):
        messages.pop()


HELP = """/image FILE   show a picture with the next message      /system TEXT_OR_FILE   change the system prompt
/save FILE    write the messages, for --messages        /reset                 begin anew
/exit         end, as Ctrl-D does                       Ctrl-C                 stop the answer
A message that begins with / needs a blank before it. While the result of a tool is asked for, all but /reset, /save and
/exit is the result; Ctrl-C takes the call back."""


def converse(talk: Conversation, model: GenerativeModel, options: argparse.Namespace, settings: dict[str, Any]) -> int:
    """The conversation in the terminal, until its input ends. What goes wrong in one turn is a line, and undone."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` line editing and history
    system = [message for message in talk.messages[:1] if message.get("role") == "system"]
    images: list[dict[str, Any]] = []  # to go with the next message
    turn = 0
    if sys.stdin.isatty():
        print("/help lists the commands", file=sys.stderr)
    while True:
        sent: list[dict[str, Any]] = []
        try:
            if awaits_user(talk.messages):
                calls = open_calls(talk.messages)
                ask = f"result of {calls[0]['function'].get('name')}> " if calls else "> "
                line = input(ask if sys.stdin.isatty() else "")
                line = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # bytes that are no UTF-8
                command, _, rest = line.partition(" ")
                rest = os.path.expanduser(rest.strip())
                if calls and command not in ("/reset", "/save", "/exit"):
                    result = {"role": "tool", "name": calls[0]["function"].get("name"), "content": line}
                    talk.messages.append(result | ({"tool_call_id": calls[0]["id"]} if "id" in calls[0] else {}))
                elif command == "/exit":
                    return 0
                elif command == "/reset":
                    talk.messages[:], images = system, []
                    talk.pictures.clear()
                elif command == "/save" and rest:
                    checkpoint.write_json(Path(rest), talk.messages)
                    print(f"{len(talk.messages)} messages in {rest}", file=sys.stderr)
                elif command == "/system" and rest:
                    system = [{"role": "system", "content": system_prompt(rest, options.model)}]
                    talk.messages[:] = system + [m for m in talk.messages if m.get("role") != "system"]
                elif command == "/image" and rest:
                    source = str(Path(rest).resolve()) if os.path.isfile(rest) else rest
                    talk.pictures.pop(source, None)  # the file may be another one by now
                    talk.picture(source)
                    images.append({"type": "image", "image": source})
                elif command.startswith("/"):
                    print(HELP if command == "/help" else f"unknown command {line}; /help lists them", file=sys.stderr)
                elif line.strip():
                    text = {"type": "text", "text": line.removeprefix(" ") if line.startswith(" /") else line}
                    talk.messages.append({"role": "user", "content": [*images, text]})
                    sent, images = images, []
            if not awaits_user(talk.messages):
                seed = None if options.seed is None else (options.seed + turn) % 2**63
                reply(talk, model, options, settings | {"seed": seed})
                turn += 1
        except EOFError:
            print(file=sys.stderr)
            return 0
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)", file=sys.stderr)
            take_back(talk.messages)
            images = sent + images
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            print(f"error: {' '.join(str(error).split())} (/reset begins anew)", file=sys.stderr)
            take_back(talk.messages)
            images = sent + images


def reply(talk: Conversation, model: GenerativeModel, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """One answer, printed as it comes; without any words or calls the question is taken back. The first Ctrl-C ends the
    answer before the next token, so that the cache stays whole; a second one breaks off."""
    writer = Writer(talk.tokenizer, options.stop, True, talk.begins_with(), options.show_thinking)
    interrupted = False

    def stop(*_: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        writer.stopped = interrupted = True

    start, previous = time.perf_counter(), signal.signal(signal.SIGINT, stop)
    try:
        message = talk.answer(model, on_token=writer.on_token, on_prompt=progress_bar(), **settings)
    finally:
        signal.signal(signal.SIGINT, previous)
        writer.close()
        print(flush=True)
    if talk.messages[-1].get("role") == "assistant":
        cut_message(talk.messages[-1], writer)
    report_calls(message)
    if not awaits_user(talk.messages):
        print("(the answer was empty; the question is taken back)", file=sys.stderr)
        take_back(talk.messages)
    ends = ending_ids(settings.get("eos_token_id"), GenerationConfig(), talk.config.get_text_config())
    ended = writer.ids and writer.ids[-1] in ends
    note = "" if ended or writer.stopped else ", cut: --max-new-tokens or the context is used up (/reset begins anew)"
    rate = measure(writer, start)["tokens_per_second"]
    print(f"{len(writer.ids)} tokens, {rate:.1f} tokens/s{note}", file=sys.stderr)


def plan_memory(
    directory: Path, config: Any, prompt: int, new: int, shrink: bool, device: torch.device, dtype: torch.dtype | None
) -> int:
    """Say what will be loaded and what that takes. Returns how many new tokens there is room for: `new`, or fewer if
    `shrink` allows it.

    Raises:
        ValueError: more than the device has left.
    """
    text, files = config.get_text_config(), checkpoint.Checkpoint(directory)
    new = min(new, text.max_position_embeddings - prompt)
    parameters = sum(math.prod(files.shape(name)) for name in files.names())
    weights = files.nbytes() if dtype is None else parameters * dtype.itemsize
    there = available_memory(device)

    def cache(new: int) -> int:
        return kv_cache_bytes(text, prompt + new, weights // max(parameters, 1))

    while shrink and there is not None and new > 256 and weights + cache(new) > there:
        new //= 2
    needed = f"{format_bytes(weights)} of weights and {format_bytes(cache(new))} of cache"
    free = "" if there is None else f", {format_bytes(there)} free"
    size = f"{parameters / 1e6:,.1f} million parameters"
    print(f"{directory}: {size}, {needed} for {prompt + new} tokens on {device}{free}", file=sys.stderr)
    if there is not None and weights + cache(new) > there:
        found = f"this takes {format_bytes(weights + cache(new))}, {device} has {format_bytes(there)} free"
        raise ValueError(f"{found}; choose a smaller model, fewer tokens, or a smaller --dtype")
    return new


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what goes wrong into one line on standard error. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    return exit_code(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    gc.freeze()  # what is imported stays: going through it for garbage takes a twentieth of the start
    sys.exit(main())
