"""Generate text: the loop without a cache (`generate_naive`), sampling (`sample`), and the loop (`generate`).

    python generate.py "To be, or not to be"

runs the bundled model, a small Ministral 3 trained on Shakespeare; `--model` takes any directory or Hub id. The command
line is in `command.py`, conversations are in `chat.py`. `generate` uses `settings.py`, which checks the arguments, and
`decoder.py`, the model with its cache.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import settings
from checkpoint import GenerationConfig, check_setting
from decoder import Decoder, choose_forward, embed_images
from fast import Flat
from ministral import KVCache, MinistralConfig, MinistralForCausalLM
from ministral3 import Ministral3ForCausalLM
from pretrained import PreTrainedConfig, at_least_float32
from vision import ImageSizes, Mistral3ForConditionalGeneration

if TYPE_CHECKING:
    from tokenizer import StopText, Tokenizer

BUNDLED = Path(__file__).resolve().parent / "models" / "shakespeare"
GenerativeModel = MinistralForCausalLM | Mistral3ForConditionalGeneration
MODELS: dict[str, type[GenerativeModel]] = {
    "ministral": MinistralForCausalLM,
    "mistral": MinistralForCausalLM,
    "llama": MinistralForCausalLM,
    "ministral3": Ministral3ForCausalLM,
    "mistral3": Mistral3ForConditionalGeneration,
}


@torch.inference_mode()
def generate_naive(model: GenerativeModel, input_ids: Tensor, max_new_tokens: int) -> Tensor:
    """Continue each row of `input_ids` (B, T) with the most likely tokens. The whole text is computed again for each
    token.

    Greedy `generate` without end tokens returns the same, but for ties within rounding. It adds a cache, sampling,
    padding, rows that end, images and a fast path.
    """
    for _ in range(max_new_tokens):
        out = model(input_ids, use_cache=False, return_dict=True)
        logits = out.logits[:, -1]  # (B, V), after the last token
        new = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        input_ids = torch.cat((input_ids, new), dim=1)
    return input_ids


# ---------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """Settings by which the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach probability p.
        min_p: keep tokens at least min_p times as likely as the most likely one.
        repetition_penalty: above 1, tokens already in the text become less likely (https://arxiv.org/abs/1909.05858).

    top_k, top_p and min_p apply in this order, after repetition_penalty and temperature, as in Transformers. A filter
    that is None is off; so are top_k=0 and top_p=1.

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
    """The `Sampling` of a call of `generate`: its arguments, or, where they are None, those of generation_config.json.

    As in Transformers it is greedy unless `do_sample` is on, in the call or in the file, with a temperature of 1 unless
    that is given. Beyond Transformers, where the call has a temperature and no do_sample: 0 is greedy, others draw.

    Raises:
        ValueError: a value outside its range, or do_sample=True with a temperature of 0.
    """
    for name, value in {"do_sample": do_sample, **arguments}.items():
        check_setting(name, value)
    values = {}
    for name, value in arguments.items():
        values[name] = value
        if value is None:
            values[name] = getattr(stored, name)
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
            names = ", ".join(unused)
            warnings.warn(f"{names}: no effect on greedy decoding; give do_sample=True", stacklevel=3)
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
    # Subtracting the maximum first changes no probability and keeps tiny temperatures from overflowing. A temperature
    # that float32 could round to 0 is raised to 1e-30, which is greedy in effect.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p  # the least likely, 1 - p together
        dropped[..., -1] = False  # the most likely token always stays
        dropped = dropped.scatter(-1, order, dropped)  # in the order of ids
        logits = logits.masked_fill(dropped, -math.inf)
    if sampling.min_p is not None:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logits


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token from each row of logits: (..., V) -> (...). Without a generator, PyTorch's global one draws."""
    logits = logits.to(at_least_float32(logits.dtype))
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = filter_logits(logits, sampling).softmax(-1)
    V = probs.shape[-1]
    return torch.multinomial(probs.reshape(-1, V), 1, generator=generator).view(logits.shape[:-1])


# ---------------------------------------------------------------------------------------------------- the loop


@dataclass
class Rows:
    """The texts of a batch: `draw` chooses the next token of each row, `append` adds them and ends rows."""

    tokens: Tensor  # ids (B, T), later (B, T + n)
    visible: Tensor  # bool (B, T + new tokens), False at padding
    max_positions: int  # tokens of a row at most, without padding
    sampling: Sampling
    generators: list[torch.Generator]  # one for each row
    ends: list[int]  # ids that end a row
    filler: int  # the id that fills up a row that has ended
    stops: list[StopText]  # one for each row, or []
    on_token: Callable[[int, int], bool | None] | None

    def __post_init__(self) -> None:
        B, total = self.visible.shape
        padding = total - self.visible.sum(dim=1)
        # The length at which each row is full, padding included.
        self.limits = (padding + self.max_positions).clamp(max=total).tolist()
        self.running = [True] * B

    def draw(self, logits: Tensor) -> Tensor:
        """New ids (B, 1) from the logits (B, V): each row draws from its own generator."""
        ids = torch.full((len(logits), 1), self.filler, dtype=self.tokens.dtype, device=self.tokens.device)
        penalty = self.sampling.repetition_penalty
        for row, row_logits in enumerate(logits):
            if not self.running[row]:
                continue
            if penalty != 1:
                text = self.tokens[row][self.visible[row, : self.tokens.shape[1]]]
                row_logits = row_logits.to(at_least_float32(row_logits.dtype))
                row_logits = penalize_repetition(row_logits, text, penalty)
            ids[row] = sample(row_logits, self.sampling, self.generators[row])
        return ids

    def append(self, ids: Tensor) -> None:
        """Add the new ids (B, 1). A row ends with an id of `ends`, a stop text, by `on_token`, or when it is full."""
        self.tokens = torch.cat((self.tokens, ids), dim=1)
        for row, token in enumerate(ids[:, 0].tolist()):
            if not self.running[row]:
                continue
            ended = token in self.ends or self.tokens.shape[1] >= self.limits[row]
            if self.on_token is not None and self.on_token(row, token):
                ended = True
            if self.stops and self.stops[row].push(token):
                ended = True
            self.running[row] = not ended


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
        attention_mask: (B, T), 1 at text and 0 at padding; None: all is text. (Padding without a mask is read as text;
            a warning says so where `pad_token_id` shows it.)
        max_new_tokens: the number of tokens that are added at most; by default 128, or as many as the `max_length` of
            generation_config.json allows. A row also ends when it fills the model's `max_position_embeddings`.
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: see `resolve_sampling` and `Sampling`. Greedy
            by default. (Transformers keeps the 50 most likely tokens where nothing says `top_k`; here that is off.)
        eos_token_id: the tokens that end a row; () means none.
        seed: one number for all rows or one for each. Every row draws from a generator of its own, so that it gets
            the same tokens as alone, up to rounding. None: from the system's entropy.
        num_return_sequences: the number of continuations of each row, one below the other; the n-th (from 0) is that of
            the row alone with seed + n, so they differ. More than one needs sampling.
        stop_strings, tokenizer: a row also ends with the token that completes one of these texts. The tokenizer
            decodes the tokens.
        on_token: called as on_token(row, id) for every new token, the ending one included, as soon as it is known;
            if it returns True, that row ends.
        prefill_chunk_size: the prompt is read (prefill) in chunks of this size, so that the memory beside weights and
            cache does not grow with it; None is 512 on a CPU and 4096 elsewhere. A chunk may end within an image.
        pixel_values, image_sizes: the images whose [IMG] tokens are in the prompts, see `images.batch_images`.
        past_key_values: the cache of an earlier call that holds the first tokens of every row; only the others are
            read, and the images are those among them. Afterwards it holds all tokens but the last.
        on_prompt: called as on_prompt(read, T) after each chunk of the prompt.
        fast: use the form of the model in `fast.py` if there is one. It computes the same function, but rounds in
            another order. False: call `model(...)`.
        compile: let `torch.compile` fuse a decode step of fixed shapes, for long texts: it takes up to a minute in each
            call. (On CUDA the fast path records and replays such a step without it, if all slots are reserved.)

    Returns:
        (B * num_return_sequences, T + n): prompts and continuations; a row that ended early is filled up with
        `pad_token_id` (with the first end-of-sequence id where there is none).

    Raises:
        ValueError: a setting out of range, an empty or padded-on-the-right row, or a prompt that leaves no position
            of `max_position_embeddings` for a new token.
    """
    # Check the arguments. Those that are None get a value from the model's files or a default.
    expect_model(model)
    config, stored = model.config.get_text_config(), model.generation_config
    device = model.device
    sampling = resolve_sampling(
        stored, do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    # (B, T), True at text.
    padding_mask = settings.check_prompt(input_ids, attention_mask, past_key_values, config, device)
    chunk_size = settings.choose_chunk_size(prefill_chunk_size, device)
    B, T = input_ids.shape
    lengths = padding_mask.sum(dim=1)
    settings.check_length(int(lengths.max()), config)
    max_positions = config.max_position_embeddings  # the shortest row has most room; longer ones end first
    new_tokens = min(settings.choose_length(stored, max_new_tokens, T), max_positions - int(lengths.min()))
    ends = settings.ending_ids(eos_token_id, stored, config)
    filler = settings.padding_id(stored, config, ends)
    copies = settings.choose_copies(num_return_sequences, stored, sampling.temperature, past_key_values)
    generators = settings.make_generators(seed, B, copies, device)
    forward = choose_forward(model, fast)
    if compile and not isinstance(forward, Flat):
        allowed = "with fast=True, 'sdpa', and a model in eval mode"
        raise ValueError(f"compile=True needs the fast path; allowed: {allowed}")

    # Lay out the rows, and the tokens that are not in the cache: ids, or embeddings where there are images.
    # Memory is reserved for all new tokens if the caller or the files give their number, else for 128.
    reserved = settings.reserved_tokens(stored, max_new_tokens, new_tokens)
    cache = past_key_values
    if cache is None:
        cache = KVCache(config, T + reserved)
    input_ids = input_ids.to(device)
    unread = input_ids[:, cache.get_seq_length() :]
    if pixel_values is not None:
        unread = embed_images(model, unread, pixel_values, image_sizes)
    if copies > 1:
        input_ids = input_ids.repeat_interleave(copies, dim=0)
        padding_mask = padding_mask.repeat_interleave(copies, dim=0)
        unread = unread.repeat_interleave(copies, dim=0)
    stops = settings.make_stop_texts(stop_strings, stored, tokenizer, input_ids, padding_mask)
    visible = F.pad(padding_mask, (0, new_tokens), value=True).to(device)  # (B * copies, T + new_tokens)
    rows = Rows(input_ids, visible, max_positions, sampling, generators, ends, filler, stops, on_token)

    # Prefill: read the prompt into the cache. Then, where it pays, record the step that follows.
    decoder = Decoder(forward, cache, visible)
    logits = decoder.prefill(unread, chunk_size, on_prompt)
    if new_tokens > 1 and (compile or (device.type == "cuda" and reserved == new_tokens)):
        decoder.record(compile)

    # Draw, append, stop, step.
    for _ in range(new_tokens):
        ids = rows.draw(logits)
        rows.append(ids)
        if not any(rows.running):  # at the latest in the last round, when every row is full
            break
        logits = decoder.step(ids)
    return rows.tokens


# ------------------------------------------------------------------------------------------------------ models


def model_class(config: dict[str, object]) -> type[GenerativeModel]:
    """The class for a config.json.

    Raises:
        ValueError: there is none for its model_type.
    """
    model_type = config.get("model_type")
    if str(model_type) not in MODELS:
        raise ValueError(f"config.json has model_type {model_type!r}; allowed: {', '.join(MODELS)}")
    return MODELS[str(model_type)]


def load_model(
    path_or_hub_id: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **others: Any,
) -> GenerativeModel:
    """`from_pretrained` of the class that config.json asks for; arguments and errors are those of
    `PreTrainedModel.from_pretrained`."""
    directory = checkpoint.find(path_or_hub_id, revision, "model", token, cache_dir, local_files_only)
    cls = model_class(checkpoint.read_config(directory))
    model = cls.from_pretrained(directory, dtype, device, attn_implementation, **others)
    model.name_or_path = str(path_or_hub_id)
    return model


def expect_model(model: Any) -> None:
    """Raise ValueError unless that is a language model of this project (or a wrapper that has its attributes)."""
    if isinstance(model, (str, Path)):
        raise ValueError(f"model must be a loaded model; found a name: give load_model({str(model)!r})")
    if not isinstance(getattr(model, "config", None), PreTrainedConfig) or not hasattr(model, "lm_head"):
        supported = "; ".join(sorted({cls.__name__ for cls in MODELS.values()}))
        name = type(model).__name__
        raise ValueError(f"model must be one that load_model returns ({supported}); found {name}")


def kv_cache_bytes(config: MinistralConfig, tokens: int, bytes_per_number: int) -> int:
    """Bytes of the keys and values of `tokens` tokens; sliding layers keep a window of them."""
    slots = 0
    for kind in config.layer_types:
        if kind == "sliding_attention" and config.sliding_window:
            slots += min(tokens, config.sliding_window)
        else:
            slots += tokens
    return 2 * slots * config.num_key_value_heads * config.head_dim * bytes_per_number


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, see `command.main`. Returns the exit code."""
    import command  # imported late: it imports this file

    return command.main(arguments)


if __name__ == "__main__":
    gc.freeze()  # imported objects stay: searching them for garbage takes a twentieth of the start
    sys.exit(main())
