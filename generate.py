"""Generate text: the sampling loop (`generate`, `sample`) and the command line.

    python generate.py "To be, or not to be"

runs the bundled model, a small Ministral 3 trained on Shakespeare; `--model` takes any directory or Hub id.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

import checkpoint
from ministral import KVCache, MinistralConfig, MinistralForCausalLM, at_least_float32
from ministral3 import Ministral3ForCausalLM
from tokenizer import TextStream, Tokenizer
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
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> GenerativeModel:
    """`from_pretrained` of the class that config.json asks for; arguments and errors are those of
    `PreTrainedModel.from_pretrained`."""
    directory = checkpoint.find(path_or_hub_id)
    cls = model_class(checkpoint.read_config(directory))
    return cls.from_pretrained(directory, dtype, device, attn_implementation)


# ---------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens.
        top_p: keep the most likely tokens that together reach probability p.
        min_p: keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: above 1, tokens already in the text become less likely (https://arxiv.org/abs/1909.05858).

    Filters apply in this order, after the temperature, as in Transformers. None is off.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, valid, allowed in (
            ("temperature", 0 <= self.temperature < math.inf, "a number not below 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number not below 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "a number from 0.01 to 100"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} is impossible; allowed: {allowed}")


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Logits (V,) with those of all tokens in ids (n,) divided by `penalty` if positive, multiplied if negative."""
    seen = logits[ids]
    return logits.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (..., V) at a temperature above 0, with those of excluded tokens at -inf."""
    # Subtracting the maximum first changes no probability and keeps tiny temperatures from overflowing; one that
    # float32 would round to 0 is raised to what is greedy anyway.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k is not None:
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
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    prefill_chunk_size: int = 512,
    pixel_values: Tensor | None = None,
    image_sizes: ImageSizes | None = None,
) -> Tensor:
    """Continue each row of `input_ids` until it ends with an end-of-sequence token or is long enough.

    Args:
        input_ids: (B, T). Shorter prompts are padded on the left.
        attention_mask: (B, T), 0 at padding; None: nothing is padding.
        max_new_tokens: how many tokens are added at most. A row also ends when it fills the model's
            `max_position_embeddings`.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. Temperature 0 is greedy.
        eos_token_id: the tokens that end a row; None takes the configuration's, () means none.
        seed: one number for all rows or one for each; every row draws from a generator of its own, so that it gets
            what it gets alone. None: from the system's entropy.
        on_token: called as on_token(row, id) for every new token, the ending one included, as soon as it is known;
            if it returns True, that row ends.
        prefill_chunk_size: the prompt is read in chunks of this size, so that the memory for attention masks grows
            with the length of the prompt and not with its square. A cut may go through a picture.
        pixel_values, image_sizes: the pictures whose [IMG] tokens are in the prompts, see `vision.batch_images`.

    Returns:
        (B, T + n): prompts and continuations; a row that ended early is filled up with `pad_token_id` (with the
        end-of-sequence id where the configuration has none).

    Raises:
        ValueError: a setting out of range, an empty or padded-on-the-right row, or a prompt that leaves no position
            of `max_position_embeddings` for a new token.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    config, device = model.config.get_text_config(), model.device
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk_size", prefill_chunk_size)):
        if value < 1:
            raise ValueError(f"{name}={value} is impossible; allowed: a whole number not below 1")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must be (batch, tokens) with at least one token; found {tuple(input_ids.shape)}")
    input_ids = input_ids.to(device)
    B, T = input_ids.shape
    real = torch.ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    if real.shape != (B, T) or not real[:, -1].all():
        raise ValueError(f"attention_mask must be {(B, T)}, padding on the left: every row ends with a real token")
    lengths = real.sum(1).tolist()
    check_length(max(lengths), config)
    max_new_tokens = min(max_new_tokens, config.max_position_embeddings - min(lengths))
    total = T + max_new_tokens
    if eos_token_id is None:
        eos_token_id = config.eos_token_id
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    if not all(0 <= end < config.vocab_size for end in ends):
        raise ValueError(f"eos_token_id={sorted(ends)} is impossible; allowed: ids below {config.vocab_size}")
    filler = config.pad_token_id if config.pad_token_id is not None else min(ends, default=0)
    generators = _generators(seed, B, device)

    # Positions skip padding, so a padded row is rotated, and its queries are scaled, as if it were alone.
    mask = None if real.all() else torch.cat((real, torch.ones(B, max_new_tokens, dtype=torch.bool)), 1).to(device)
    first_positions = torch.tensor([[length - T] for length in lengths], device=device)

    embeds = None
    if isinstance(model, Mistral3ForConditionalGeneration) and pixel_values is not None:
        embeds, _ = model.model.embed(input_ids, pixel_values.to(device), image_sizes)
    elif pixel_values is not None:
        raise ValueError(f"pixel_values for a {type(model).__name__}, which has no eyes; allowed: a mistral3 model")

    def step(start: int, ids: Tensor) -> Tensor:
        """Feed ids (B, S) that begin at slot `start`; the logits after the last of them, (B, V)."""
        end = start + ids.shape[1]
        positions = (first_positions + torch.arange(start, end, device=device)).clamp(min=0)
        seen = None if mask is None else mask[:, :end]
        text = {"input_ids": ids} if embeds is None or start >= T else {"inputs_embeds": embeds[:, start:end]}
        arguments = dict(attention_mask=seen, position_ids=positions, past_key_values=cache, **text)
        return model(**arguments, use_cache=True, logits_to_keep=1).logits[:, -1]

    cache, tokens = KVCache(config, expected=total), input_ids
    for start in range(0, T, prefill_chunk_size):
        logits = step(start, input_ids[:, start : start + prefill_chunk_size])
    running = [True] * B
    for slot in range(T, total):
        new = torch.full((B, 1), filler, dtype=tokens.dtype, device=device)
        for row in (row for row in range(B) if running[row]):
            scores = logits[row]
            if repetition_penalty != 1:
                said = torch.cat((tokens[row, :T][real[row].to(device)], tokens[row, T:]))
                scores = penalize_repetition(scores.to(at_least_float32(scores.dtype)), said, repetition_penalty)
            new[row] = sample(scores, sampling, generators[row])
        tokens = torch.cat((tokens, new), dim=1)
        for row, token in enumerate(new[:, 0].tolist()):
            if running[row]:
                stop = on_token(row, token) if on_token else False
                full = lengths[row] + tokens.shape[1] - T >= config.max_position_embeddings
                running[row] = not (stop or full or token in ends)
        if not any(running) or slot + 1 == total:
            break
        logits = step(slot, new)
    return tokens


def check_length(tokens: int, config: MinistralConfig) -> None:
    """Raise ValueError if a prompt of that many tokens leaves no position for a new one."""
    limit = config.max_position_embeddings
    if tokens >= limit:
        raise ValueError(f"the prompt has {tokens} tokens; allowed: below max_position_embeddings={limit}; shorten it")


def _generators(seed: int | Sequence[int] | None, rows: int, device: torch.device) -> list[torch.Generator]:
    generators = [torch.Generator(device) for _ in range(rows)]
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * rows
    if len(seeds) != rows:
        raise ValueError(f"seed must be one number or one for each of {rows} rows; found {len(seeds)}")
    for generator, number in zip(generators, seeds):
        if number is not None and not 0 <= number < 2**63:
            raise ValueError(f"seed={number} is impossible; allowed: a whole number from 0 to 2**63 - 1")
        if number is None:
            generator.seed()
        else:
            generator.manual_seed(int(number))
    return generators


# ------------------------------------------------------------------------------------------------ command line


class Parser(argparse.ArgumentParser):
    """Reports wrong use in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line (None: of this process)."""
    parser = Parser(description="Continue a text with a Ministral model.")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file, - for standard input")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture, before the text; also"
                        " a web address or data: URI (repeatable)")  # fmt: skip
    parser.add_argument("--model", default=str(BUNDLED), metavar="DIR_OR_HUB_ID", help="default: the bundled model")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default: 0.8")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the most likely tokens that make up P")
    parser.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the most likely one")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same text")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: as stored")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--attn", choices=("sdpa", "eager"), default="sdpa", help="attention implementation")
    parser.add_argument("--json", action="store_true", help="print one JSON object with text, ids, settings, timing")
    return parser.parse_args(arguments)


DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt, from the command line, a file or standard input.

    Raises:
        ValueError: none, two, an empty one, or one that is not UTF-8.
        OSError: the file cannot be read.
    """
    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError("give a PROMPT or --prompt-file FILE, one of the two")
    if options.prompt is not None:
        data = os.fsencode(options.prompt)
    elif options.prompt_file == "-":
        data = sys.stdin.buffer.read()
    else:
        data = Path(options.prompt_file).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8: {error}") from error
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def read_picture(source: str, config: Mistral3Config, tokenizer: Tokenizer) -> tuple[Tensor, list[int]]:
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


def encode_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, config: Any
) -> tuple[Tensor, Tensor | None, ImageSizes | None]:
    """A conversation, with pictures from files, web addresses or `data:` URIs, as `generate` takes it: input_ids
    (1, T), pixel_values and image_sizes (None without pictures). Raises as `Tokenizer.encode_chat` and `load_image`.
    """
    pictures: list[Tensor] = []

    def encode_image(source: str) -> list[int]:
        picture, ids = read_picture(source, config, tokenizer)
        pictures.append(picture)
        return ids

    ids = tokenizer.encode_chat(messages, encode_image if isinstance(config, Mistral3Config) else None)
    return torch.tensor([ids]), *(batch_images(pictures) if pictures else (None, None))


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
        raise ValueError(f"--device {name}: this machine has none; allowed here: {present}")
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


def human(nbytes: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


class Writer:
    """Prints text as its tokens arrive, whole characters only, and nothing from a stop text on."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], print_now: bool) -> None:
        self.stream, self.stops, self.print_now = TextStream(tokenizer), [s for s in stops if s], print_now
        self.text, self.shown, self.stopped = "", 0, False
        self.ids: list[int] = []
        self.times: list[float] = []

    def on_token(self, row: int, token: int) -> bool:
        self.ids.append(token)
        self.times.append(time.perf_counter())
        self._add(self.stream.push(token))
        return self.stopped

    def close(self) -> None:
        if not self.stopped:
            self._add(self.stream.close(), last=True)

    def _add(self, piece: str, last: bool = False) -> None:
        self.text += piece
        found = [place for place in (self.text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        ready = len(self.text)
        if not (self.stopped or last):  # the end of the text may be the beginning of a stop text
            lengths = (n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
            ready -= max(lengths, default=0)
        if self.print_now and ready > self.shown:
            sys.stdout.write(self.text[self.shown : ready])
            sys.stdout.flush()
        self.shown = max(self.shown, ready)


def run(options: argparse.Namespace) -> int:
    """The command: load, generate, print. Returns the exit code; raises what `main` turns into one line."""
    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty
    )
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: allowed: a whole number not below 1")
    prompt, device, dtype = read_prompt(options), choose_device(options.device), DTYPES[options.dtype]
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed

    directory = checkpoint.find(options.model)
    content = checkpoint.read_config(directory)
    cls = model_class(content)
    whole = cls.config_class.from_dict(content)
    config: MinistralConfig = whole.get_text_config()
    if options.image and cls is not Mistral3ForConditionalGeneration:
        found = f"{directory} has no eyes (model_type {config.model_type!r})"
        raise ValueError(f"--image: {found}; allowed: a model of type 'mistral3'")
    tokenizer = Tokenizer.from_dir(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={config.vocab_size}"
        )
    pictures = [read_picture(source, whole, tokenizer) for source in options.image]
    ids = tokenizer.encode("") + [i for _, tokens in pictures for i in tokens] + tokenizer.encode(prompt, bos=False)
    pixel_values, image_sizes = batch_images([pixels for pixels, _ in pictures]) if pictures else (None, None)
    check_length(len(ids), config)
    plan_memory(directory, config, len(ids) + options.max_new_tokens, device, dtype)
    model = cls.from_pretrained(directory, dtype, device, options.attn)

    writer = Writer(tokenizer, options.stop, print_now=not options.json)
    start, interrupted = time.perf_counter(), False
    try:
        generate(
            model,
            torch.tensor([ids]),
            max_new_tokens=options.max_new_tokens,
            seed=seed,
            on_token=writer.on_token,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            **asdict(sampling),
        )
    except KeyboardInterrupt:
        interrupted = True
    writer.close()
    seconds = (writer.times[-1] if writer.times else time.perf_counter()) - start
    rate = len(writer.ids) / seconds if writer.ids else 0.0
    dtype_name = str(model.dtype).removeprefix("torch.")
    if options.json:
        settings: dict[str, object] = {"model": str(directory), "device": str(device), "dtype": dtype_name}
        settings |= {"attn": options.attn}
        settings |= asdict(sampling) | {"max_new_tokens": options.max_new_tokens, "seed": seed, "stop": options.stop}
        first = writer.times[0] - start if writer.times else None
        timing = {"first_token_seconds": first, "seconds": seconds, "tokens_per_second": rate}
        result: dict[str, object] = {"prompt": prompt, "images": options.image, "text": writer.text}
        result |= {"prompt_ids": ids, "ids": writer.ids}
        result |= {"settings": settings, "timing": timing, "interrupted": interrupted}
        print(json.dumps(result, ensure_ascii=False))
    else:
        print(flush=True)
    print(
        f"{len(writer.ids)} tokens, {rate:.1f} tokens/s, {directory}, {device}, {dtype_name}, seed {seed}"
        + (", interrupted" if interrupted else ""),
        file=sys.stderr,
    )
    return 130 if interrupted else 0


def plan_memory(
    directory: Path, config: MinistralConfig, tokens: int, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Say what will be loaded and what that takes.

    Raises:
        ValueError: more than the device has left.
    """
    files = checkpoint.Checkpoint(directory)
    parameters = sum(math.prod(files.shape(name)) for name in files.names())
    weights = files.nbytes() if dtype is None else parameters * dtype.itemsize
    cache = kv_cache_bytes(config, min(tokens, config.max_position_embeddings), weights // max(parameters, 1))
    there = available_memory(device)
    print(
        f"{directory}: {parameters / 1e6:,.1f} million parameters, {human(weights)} of weights and {human(cache)} of"
        f" cache for {tokens} tokens on {device}" + (f", {human(there)} free" if there is not None else ""),
        file=sys.stderr,
    )
    if there is not None and weights + cache > there:
        raise ValueError(
            f"this takes {human(weights + cache)}, {device} has {human(there)} free; choose a smaller model, fewer"
            " tokens, or a smaller --dtype"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what goes wrong into one line on standard error. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        return run(parse_arguments(arguments))
    except BrokenPipeError:  # the reader of a pipe has gone: nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
