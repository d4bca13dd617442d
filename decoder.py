"""A model with the cache of its text, for `generate`: `prefill` reads the prompt, `step` one more token of each row.

`choose_forward` chooses, once for a text, what computes the logits: `model(...)`, or the faster `fast.FlatModel`. With
the latter, a single token can be computed by a recorded step (`recorded_step.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from blockwise import blockwise_attention
from checks import expect_tensor
from fast import FlatModel, text_model
from ministral import ATTENTION, KVCache, MinistralConfig, sdpa_attention
from pretrained import ACTIVATIONS
from recorded_step import RecordedStep, recorded_step
from vision import ImageSizes, Mistral3ForConditionalGeneration

Forward = Callable[[Tensor, Tensor, KVCache, Tensor | None], Tensor]
Progress = Callable[[int, int], object]


# The Python modules that define the layers which `FlatModel` computes (tests/test_layout.py).
OWN_MODULES = {"ministral", "ministral3", "pretrained", nn.ModuleList.__module__}


def why_not(model: Any) -> str | None:
    """The reason why `generate` must not use `FlatModel`, as a text for the user; None: it computes the same as
    `model(...)`."""
    text = text_model(model)
    if model.training:
        return "the model is in training mode"
    if text.config.attn_implementation == "eager":
        return "attn_implementation is 'eager'"
    # `FlatModel` calls no modules, so it would skip hooks and forward methods that the user has added or replaced.
    if ATTENTION[text.config.attn_implementation] not in (sdpa_attention, blockwise_attention):
        return "an entry of ministral.ATTENTION is not that of this project"
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "all modules have hooks"
    for part in model.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{type(part).__name__} has hooks"
    computed = [*text.modules(), model.lm_head]
    for part in [model, model.base_model, *computed]:
        origin = type(part).forward.__module__
        own = origin in OWN_MODULES or origin.startswith(("vision", "torch."))
        if "forward" in part.__dict__ or not own:
            return f"the forward of {type(part).__name__} is not that of this project"
    # It multiplies by plain weights: adapters, quantised weights and biases would have no effect, or fail.
    act = ACTIVATIONS[text.config.hidden_act]
    if any(layer.mlp.act is not act for layer in text.layers):
        return "a layer has another activation than its configuration"
    if {part.eps for part in computed if hasattr(part, "eps")} != {text.norm.eps}:
        return "norms have several values of eps"
    for part in computed:
        kind = type(part)
        if kind.__module__ not in OWN_MODULES:
            return f"{kind.__module__}.{kind.__name__} is not a class of this project"
        if hasattr(part, "weight") and type(part.weight.data) is not Tensor:
            return f"a weight of {kind.__name__} is a {type(part.weight.data).__name__}"
        if getattr(part, "bias", None) is not None:
            return f"{kind.__name__} has a bias"
    return None


WARNED_REASONS: set[str] = set()  # why `fast.py` was not used; each is in one warning only


def choose_forward(model: Any, fast: bool | str) -> Forward:
    """The function that reads S new tokens: forward(x, position_ids, cache, mask) -> logits (B, V) after the last one.
    x is ids (B, S) or embeddings (B, S, E), the mask bool (B, past + S), False at padding, or None.

    Args:
        model: the model.
        fast: True: `fast.FlatModel`. False: `model(...)`. "auto": `fast.FlatModel` if it supports the model
            (`why_not`), else `model(...)`, with a warning that gives the reason, once for each reason.

    Raises:
        ValueError: fast=True for a model that `fast.FlatModel` does not support; another value of `fast`.
    """
    if fast != "auto" and not isinstance(fast, bool):
        raise ValueError(f"fast={fast!r} is impossible; allowed: True, False, 'auto'")
    reason = None
    if fast:
        reason = why_not(model)
        if reason is None:
            return FlatModel(model)
    if fast is True:
        raise ValueError(f"fast=True is not supported: {reason}; give fast=False, or change the model")
    if reason is not None and reason not in WARNED_REASONS:
        WARNED_REASONS.add(reason)
        message = f"generate runs model(...), which is slower: {reason}; fast=False hides this warning"
        warnings.warn(message, stacklevel=3)

    def forward(x: Tensor, position_ids: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        inputs = {"input_ids": x}
        if x.ndim == 3:
            inputs = {"inputs_embeds": x}
        arguments = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}
        outputs = model(**inputs, **arguments, use_cache=True, logits_to_keep=1, return_dict=True)
        logits: Tensor = outputs.logits[:, -1]
        return logits

    return forward


def embed_images(
    model: Any, input_ids: Tensor, pixel_values: Tensor | None, image_sizes: ImageSizes | None
) -> Tensor:  # fmt: skip
    """Embeddings (B, S, E) of ids (B, S) and of the images whose [IMG] tokens are among them.

    Raises:
        ValueError: the model is a text model; other cases as in `Mistral3Model.embed`.
    """
    pixels: Any = pixel_values
    expect_tensor("pixel_values", pixels)
    if not isinstance(model, Mistral3ForConditionalGeneration):
        name = type(model).__name__
        raise ValueError(f"pixel_values for a {name}, a text model; allowed: a mistral3 model")
    embeds, _ = model.model.embed(input_ids, pixels.to(model.device), image_sizes)
    return embeds


@torch.no_grad()
def expect_finite(model: Any, x: Tensor, mask: Tensor, logits: Tensor) -> None:
    """Raise ValueError if logits (B, V) have NaN or infinite numbers. The message names the weight, or else the first
    part of the model, where they begin.

    Args:
        x: what was read: ids (B, S) or embeddings (B, S, E).
        mask: bool (B, S), False at padding.
    """
    if logits.isfinite().all():
        return
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            cure = "`python -m checkpoint info --check DIR` lists all such tensors; fetch the model again"
            raise ValueError(f"{name} has numbers that are NaN or infinite; {cure}")
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            output = output[0]
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    handles = [part.register_forward_hook(partial(look, name)) for name, part in model.named_modules()]
    try:
        inputs = {"input_ids": x}
        if x.ndim == 3:
            inputs = {"inputs_embeds": x}
        model(**inputs, attention_mask=mask, use_cache=False, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    first = next(iter(found), "the cache")
    kind = str(logits.dtype).removeprefix("torch.")
    raise ValueError(f"the output of {first} is the first that is NaN or infinite in {kind}; try another dtype")


class Decoder:
    """The state of a model that reads B rows.

    Args:
        forward: see `choose_forward`.
        cache: the cache, which may hold the first tokens of every row.
        visible: bool (B, slots), False at padding; there is a slot for every token of the prompt and every new one.
        record: decode by a recorded step. Without effect unless `forward` is a `FlatModel`.
        compile: compile the recorded step.
        expected: the length of the text, in tokens, for which memory is reserved.
    """

    def __init__(
        self, forward: Forward, cache: KVCache, visible: Tensor, record: bool, compile: bool, expected: int
    ) -> None:
        self.forward = forward
        self.cache = cache
        self.visible = visible
        # Positions skip padding, so a padded row is rotated, and its queries are scaled, as if it were alone.
        self.positions = (visible.cumsum(dim=1) - 1).clamp(min=0)  # (B, slots)
        self.mask = None if visible.all() else visible
        self.record = record
        self.compile = compile
        self.expected = expected
        self.recorded: RecordedStep | None = None

    def prefill(self, x: Tensor, chunk_size: int, on_prompt: Progress | None = None) -> Tensor:
        """Read the prompt, ids (B, S) or embeddings (B, S, E), in chunks. Returns the logits (B, V) after it."""
        length = self.cache.get_seq_length() + x.shape[1]
        for chunk in torch.split(x, chunk_size, dim=1):
            logits = self.read(chunk)
            if on_prompt is not None:
                on_prompt(self.cache.get_seq_length(), length)
        return logits

    def read(self, x: Tensor) -> Tensor:
        """Read S new tokens, ids (B, S) or embeddings (B, S, E). Returns the logits (B, V) after the last of them."""
        start = self.cache.get_seq_length()
        end = start + x.shape[1]
        mask = self.mask
        if mask is not None:
            mask = mask[:, :end]
        return self.forward(x, self.positions[:, start:end], self.cache, mask)

    def step(self, ids: Tensor) -> Tensor:
        """Read one more token of each row, (B, 1). Returns the logits (B, V) after it. (A recorded step overwrites them
        in the next call.)"""
        if not self.record or not isinstance(self.forward, FlatModel):
            return self.read(ids)
        if self.recorded is None or self.cache.get_seq_length() == self.recorded.room:
            self.recorded = None  # frees its memory before another one is made
            self.recorded = recorded_step(self.forward, self.cache, self.visible, self.expected, self.compile)
        return self.recorded(ids)


def kv_cache_bytes(config: MinistralConfig, tokens: int, bytes_per_number: int) -> int:
    """Bytes of the keys and values of `tokens` tokens; sliding layers keep a window of them."""
    slots = 0
    for kind in config.layer_types:
        if kind == "sliding_attention" and config.sliding_window:
            slots += min(tokens, config.sliding_window)
        else:
            slots += tokens
    return 2 * slots * config.num_key_value_heads * config.head_dim * bytes_per_number
