"""Generate text: the loop without a cache (`generate_naive`), sampling (`sample`), and the loop (`generate`).

    python generate.py "To be, or not to be"

runs the bundled model, a miniature Ministral 3; `--model` takes any directory or Hub id. The command line is in
`command.py`, conversations are in `chat.py`. `generate` uses `settings.py`, which checks the arguments, and
`decoder.py`, the model with its cache. `model_types.py` has `load_model`.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import checks
import settings
from checkpoint import GenerationConfig, check_setting
from decoder import Decoder, Forward, choose_forward, embed_images, expect_finite
from fast import FlatModel
from ministral import KVCache
from model_types import BUNDLED as BUNDLED, GenerativeModel, expect_model, load_model as load_model
from outputs import ModelOutput, at_least_float32
from recorded_step import compiling_pays, recording_pays
from settings import Plan
from vision import ImageSizes

if TYPE_CHECKING:
    from tokenizer import StopText, Tokenizer


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


def resolve_sampling(resolved: GenerationConfig, given: Mapping[str, Any]) -> Sampling:
    """The `Sampling` of a call of `generate`.

    As in Transformers it is greedy unless `do_sample` is on, in the call or in the file, with a temperature of 1 unless
    that is given. Beyond Transformers, where the call has a temperature and no do_sample: 0 is greedy, others draw.

    Args:
        resolved: the settings of the call, completed by those of the model.
        given: the settings of the call alone.

    Raises:
        ValueError: do_sample=True with a temperature of 0.
    """
    do_sample, temperature = given.get("do_sample"), given.get("temperature")
    if do_sample and temperature == 0:
        raise ValueError("do_sample=True with temperature=0, which is greedy; allowed: one of the two")
    if do_sample is None and temperature is not None:
        do_sample = temperature > 0
    if do_sample is None:
        do_sample = bool(resolved.do_sample)
    penalty = settings.first_given(resolved.repetition_penalty, 1.0)
    if not do_sample:
        unused = [name for name in ("temperature", "top_k", "top_p", "min_p") if given.get(name)]
        if unused:
            names = ", ".join(unused)
            warnings.warn(f"{names}: no effect on greedy decoding; give do_sample=True", stacklevel=3)
        return Sampling(repetition_penalty=penalty)
    temperature = settings.first_given(resolved.temperature, 1.0)
    return Sampling(temperature, resolved.top_k, resolved.top_p, resolved.min_p, penalty)


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Logits (..., V) with those of all tokens in ids (..., n) divided by `penalty` if positive, else multiplied."""
    seen = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (..., V) at a temperature above 0, with those of excluded tokens at -inf."""
    if sampling.temperature < 1e-6:
        # Subtracting the maximum changes no probability and keeps the division from overflowing.
        logits = logits - logits.amax(-1, keepdim=True)
    # A temperature that float32 could round to 0 is raised to 1e-30, which is greedy in effect.
    logits = logits / max(float(sampling.temperature), 1e-30)  # PyTorch refuses whole numbers from 2**63 on
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


def sample(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> Tensor:
    """Draw one token from each row of logits: (..., V) -> (...).

    Args:
        logits: (..., V), or (B, V) with a list of generators.
        sampling: how.
        generator: draws for all rows; None: PyTorch's global one. A list has one generator for each row, so that a row
            gets the same token as alone.

    Raises:
        ValueError: the logits contain NaN.
    """
    logits = logits.to(at_least_float32(logits.dtype))
    if sampling.temperature == 0:
        probs = logits.amax(-1)  # NaN if one of them is
    else:
        probs = filter_logits(logits, sampling).softmax(-1)
    if probs.isnan().any():
        cure = "check the weights and the dtype"
        raise ValueError(f"no token can be drawn, because the logits contain NaN; {cure}")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    if isinstance(generator, Sequence):
        # All rows in one call, as in `torch.multinomial`: the token with the largest quotient of its probability and
        # an exponentially distributed random number.
        noise = torch.empty_like(probs)
        for row, own in zip(noise, generator):
            row.exponential_(generator=own)
        return (probs / noise).argmax(-1)
    V = probs.shape[-1]
    return torch.multinomial(probs.reshape(-1, V), 1, generator=generator).view(logits.shape[:-1])


# ---------------------------------------------------------------------------------------------------- the loop


LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
StoppingCriterion = Callable[[Tensor, Any], Any]


@dataclass
class Callbacks:
    """The caller's functions, see `generate`."""

    logits_processor: Sequence[LogitsProcessor]
    stopping_criteria: Sequence[StoppingCriterion]
    streamer: Any
    on_token: Callable[[int, int], bool | None] | None


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """The result of `generate` with `return_dict_in_generate`.

    Attributes:
        sequences: (B, T + n) ids, prompts and continuations.
        scores: n tensors (B, V) with `output_scores`: the logits after penalty, processors, temperature and filters.
        logits: n tensors (B, V) with `output_logits`: those of the model.
        attentions, hidden_states: always None.
        past_key_values: the cache, which holds all tokens but the last.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: None = None
    hidden_states: None = None
    past_key_values: Any = None


class Rows:
    """The texts of a batch. `draw` chooses the next token of each row; `append` adds these tokens and ends rows.

    Args:
        tokens: ids (B, T) of the prompts.
        visible: bool (B, T + new tokens), False at padding.
        plan: see `settings.Plan`.
        sampling: how tokens are drawn.
        stops: one `StopText` for each row, or [].
        callbacks: the caller's functions.
        resolved: which logits are kept for the result.
    """

    def __init__(
        self, tokens: Tensor, visible: Tensor, plan: Plan, sampling: Sampling, stops: list[StopText],
        callbacks: Callbacks, resolved: GenerationConfig,
    ) -> None:  # fmt: skip
        self.tokens = tokens  # later (B, T + n)
        self.text_mask = visible.cumsum(dim=1) > 0  # (B, T + new tokens), False at the padding before a text
        self.plan = plan
        self.sampling = sampling
        self.stops = stops
        self.callbacks = callbacks
        self.as_dict = bool(resolved.return_dict_in_generate)
        # The logits (B, V) of each step, and the same after penalty, processors and filters. None: they are not kept.
        self.logits: list[Tensor] | None = None
        self.scores: list[Tensor] | None = None
        if self.as_dict and resolved.output_logits:
            self.logits = []
        if self.as_dict and resolved.output_scores:
            self.scores = []

        B, total = visible.shape
        padding = total - visible.sum(dim=1)
        # The length at which each row is full, padding included.
        self.limits = (padding + plan.max_positions).clamp(max=total).tolist()
        self.running = [True] * B
        if callbacks.streamer is not None:
            callbacks.streamer.put(tokens.cpu())

    def draw(self, logits: Tensor) -> Tensor:
        """New ids (B, 1) from the logits (B, V). With a generator for each row, a row draws as if it were alone."""
        logits = logits.to(at_least_float32(logits.dtype), copy=True)  # a recorded step writes over its own
        if self.logits is not None:
            self.logits.append(logits)
        scores = self.score(logits)
        generators = self.plan.generators
        ids = sample(scores, self.sampling, generators if generators else None)
        if not all(self.running):
            running = torch.tensor(self.running, device=ids.device)
            ids = ids.where(running, self.plan.filler)
        return ids[:, None]

    def score(self, logits: Tensor) -> Tensor:
        """Logits (B, V) after the repetition penalty and the processors. Keeps them, filtered, if they are wanted."""
        scores = logits
        penalty = self.sampling.repetition_penalty
        if penalty != 1:
            text_mask = self.text_mask[:, : self.tokens.shape[1]]
            text = self.tokens.where(text_mask, self.tokens[:, -1:])  # padding becomes a token of the text
            scores = penalize_repetition(logits, text, penalty)
        for process in self.callbacks.logits_processor:
            scores = process(self.tokens, scores)
            checks.expect("the result of a logits processor", scores, tuple(logits.shape))
        if self.scores is not None:
            kept = scores.clone()
            if self.sampling.temperature > 0:
                kept = filter_logits(scores, self.sampling)
            self.scores.append(kept)
        return scores

    def append(self, ids: Tensor) -> None:
        """Add the new ids (B, 1). A row ends with an id of `ends`, a stop text, by `on_token`, a criterion, or when it
        is full."""
        self.tokens = torch.cat((self.tokens, ids), dim=1)
        if self.callbacks.streamer is not None:
            self.callbacks.streamer.put(ids[:, 0].cpu())
        ended = torch.zeros(len(ids), dtype=torch.bool)
        for criterion in self.callbacks.stopping_criteria:
            answer = torch.as_tensor(criterion(self.tokens, self.scores))
            checks.expect("the result of a stopping criterion", answer, (), (len(ids),))
            ended |= answer.bool().cpu()
        for row, token in enumerate(ids[:, 0].tolist()):
            if not self.running[row]:
                continue
            if token in self.plan.ends or self.tokens.shape[1] >= self.limits[row]:
                ended[row] = True
            if self.callbacks.on_token is not None:
                ended[row] |= bool(self.callbacks.on_token(row, token))
            if self.stops:
                ended[row] |= self.stops[row].push(token)
            self.running[row] = not ended[row]

    def finish(self, cache: KVCache) -> Any:
        """The result of `generate`."""
        if self.callbacks.streamer is not None:
            self.callbacks.streamer.end()
        tokens = self.tokens.clone()  # an ordinary tensor outside of inference mode
        if not self.as_dict:
            return tokens
        result = GenerateDecoderOnlyOutput(tokens, past_key_values=cache)
        if self.scores is not None:
            result.scores = tuple(self.scores)
        if self.logits is not None:
            result.logits = tuple(self.logits)
        return result


def choose_step(
    forward: Forward, compile: bool | None, plan: Plan, device: torch.device
) -> tuple[bool, bool]:
    """Whether decode steps are recorded, and whether they are compiled, too (see `recorded_step.py`).

    Raises:
        ValueError: `compile=True` for another function than a `FlatModel`; another value of it.
    """
    if compile is not None and not isinstance(compile, bool):
        raise ValueError(f"compile={compile!r} is impossible; allowed: True, False, None")
    is_fast = isinstance(forward, FlatModel)
    if compile and not is_fast:
        raise ValueError("compile=True with fast=False; only the fast path can be compiled")
    if compile is None:
        compile = is_fast and compiling_pays(plan.reserved, device)
    record = compile or (is_fast and recording_pays(plan.new_tokens, device))
    return record, compile


def generate(
    model: GenerativeModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    generation_config: Any = None,
    seed: int | Sequence[int] | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: ImageSizes | None = None,
    past_key_values: KVCache | None = None,
    tokenizer: Tokenizer | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriterion] | None = None,
    streamer: Any = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_prompt: Callable[[int, int], object] | None = None,
    prefill_chunk_size: int | None = None,
    fast: bool | str = "auto",
    compile: bool | None = None,
    **other_settings: Any,
) -> Any:
    """Continue each row of `input_ids` until it ends with an end-of-sequence token or is long enough.

    `model.generate(...)` takes the same arguments. It differs in defaults, which are those of Transformers (see
    `settings.transformers_call`).

    Args:
        model: a causal language model or a vision model of this project.
        input_ids: (B, T). Shorter prompts are padded on the left.
        attention_mask: (B, T), 1 at text and 0 at padding; None: all is text. (A warning is given if a row then begins
            or ends with `pad_token_id`.)
        max_new_tokens: the number of tokens that are added at most; by default 128, or as many as `max_length`, which
            counts the prompt, allows. A row also ends when it fills the model's `max_position_embeddings`.
        generation_config: settings in one object, `GenerationConfig`. Those of the call have precedence over it, and it
            has over `model.generation_config` (the model's generation_config.json).
        seed: one number for all rows or one for each. Every row draws from a generator of its own, so that it gets
            the same tokens as alone, up to rounding. None: PyTorch's global generator draws, as in Transformers.
        pixel_values, image_sizes: the images whose [IMG] tokens are in the prompts, see `images.batch_images`.
        past_key_values: the cache of an earlier call that holds the first tokens of every row; only the others are
            read, and the images are those among them. Afterwards it holds all tokens but the last.
        tokenizer: decodes the tokens for `stop_strings`.
        logits_processor: functions (ids (B, T + n), scores (B, V)) -> scores, applied after the repetition penalty and
            before temperature and filters. Transformers' processors are such functions.
        stopping_criteria: functions (ids (B, T + n), scores or None) -> bool, or bool (B,): whether rows end.
        streamer: its `put` gets the prompts (B, T) and then the new ids (B,) of each step, on the CPU; `end` ends it.
        on_token: called as on_token(row, id) for every new token, the ending one included, as soon as it is known;
            if it returns True, that row ends.
        on_prompt: called as on_prompt(read, T) after each chunk of the prompt.
        prefill_chunk_size: the prompt is read (prefill) in chunks of this size, so that the memory beside weights and
            cache does not grow with it; None is 512 on a CPU and 4096 elsewhere. A chunk may end within an image.
        fast: True: use `fast.py`, which computes the same function, but rounds in another order. False: call
            `model(...)`. "auto": use `fast.py` for models that it supports; for others, call `model(...)` and give the
            reason in a warning, once for each reason.
        compile: let `torch.compile` fuse the operations of a decode step; needs the fast path. It took 31 seconds in
            the first call and 0.1 seconds in the second. The 3B shape then decoded 352 instead of 249 tokens a second
            (H200). None: compile on CUDA if Triton is installed and `max_new_tokens` is 32,768 or more. Without
            compiling, steps on CUDA are recorded from 8 new tokens on.

    Other settings, those of `GenerationConfig`:
        do_sample, temperature, top_k, top_p, min_p, repetition_penalty: see `resolve_sampling` and `Sampling`. Greedy
            by default. (Transformers keeps the 50 most likely tokens where nothing says `top_k`; here that is off.)
        eos_token_id: the tokens that end a row; () means none.
        pad_token_id: fills up rows that ended early; by default the first end-of-sequence id.
        num_return_sequences: the number of continuations of each row, one below the other; with a seed, the n-th (from
            0) is that of the row alone with seed + n. More than one needs sampling.
        stop_strings: a row also ends with the token that completes one of these texts.
        output_logits, output_scores, return_dict_in_generate: see Returns.

    Returns:
        (B * num_return_sequences, T + n): prompts and continuations. With `return_dict_in_generate`, a
        `GenerateDecoderOnlyOutput`.

    Raises:
        ValueError: an unknown or unsupported argument, a setting out of range, a row that is empty or ends with
            padding, a prompt that leaves no position of `max_position_embeddings` for a new token, `fast=True` for a
            model that `fast.py` does not support, or `compile=True` without the fast path.
    """
    # Check the arguments. Those that are None get a value from the model's files or a default.
    expect_model(model)
    device = model.device
    given = settings.given_settings(generation_config, other_settings | {"max_new_tokens": max_new_tokens})
    resolved = settings.resolve(model.generation_config, given)
    sampling = resolve_sampling(resolved, given)
    plan = settings.make_plan(
        model, input_ids, attention_mask, past_key_values, resolved, sampling.temperature, seed,
        prefill_chunk_size,
    )  # fmt: skip
    processors, criteria = checks.as_list(logits_processor), checks.as_list(stopping_criteria)
    callbacks = Callbacks(processors, criteria, streamer, on_token)
    if compile and fast == "auto":
        fast = True  # only the fast path can be compiled
    forward = choose_forward(model, fast)
    record, compile = choose_step(forward, compile, plan, device)

    # A cache that the caller keeps must hold tensors that other code may use, so not those of inference mode.
    private = past_key_values is None and not resolved.return_dict_in_generate
    with torch.inference_mode() if private else torch.no_grad():
        # Lay out the rows, and the tokens that are not in the cache: ids, or embeddings where there are images.
        # Memory is reserved for all new tokens if the caller or the files give their number, else for 128.
        cache = past_key_values
        expected = input_ids.shape[1] + plan.reserved
        if cache is None:
            cache = KVCache(model.config, expected)
        prompts = input_ids.to(device).repeat_interleave(plan.copies, dim=0)
        unread = input_ids.to(device)[:, cache.get_seq_length() :]
        if pixel_values is not None or image_sizes is not None:
            unread = embed_images(model, unread, pixel_values, image_sizes)
        unread = unread.repeat_interleave(plan.copies, dim=0)
        padding_mask = plan.padding_mask.repeat_interleave(plan.copies, dim=0)
        visible = F.pad(padding_mask, (0, plan.new_tokens), value=True).to(device)
        stops = settings.make_stop_texts(resolved, tokenizer, prompts, padding_mask)
        rows = Rows(prompts, visible, plan, sampling, stops, callbacks, resolved)

        # Prefill: read the prompt into the cache.
        decoder = Decoder(forward, cache, visible, record, compile, expected)
        logits = decoder.prefill(unread, plan.chunk_size, on_prompt)
        expect_finite(model, unread, padding_mask[:, -unread.shape[1] :].to(device), logits)

        # Draw, append, stop, step.
        for _ in range(plan.new_tokens):
            ids = rows.draw(logits)
            rows.append(ids)
            if not any(rows.running):  # at the latest in the last round, when every row is full
                break
            logits = decoder.step(ids)
    return rows.finish(cache)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, see `command.main`. Returns the exit code."""
    import command  # imported late: it imports this file

    return command.main(arguments)


if __name__ == "__main__":
    gc.freeze()  # imported objects stay: searching them for garbage takes a twentieth of the start
    sys.exit(main())
