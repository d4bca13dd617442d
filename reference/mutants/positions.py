"""Mistakes of positions: the query scale, masks, windows, the positions themselves, the ring of the cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import checks
from ministral import (
    KVCache,
    MinistralAttention,
    MinistralForCausalLM,
    MinistralModel,
    RotaryEmbedding,
    SlidingLayerCache,
)
from ministral3 import Ministral3Attention, YarnRotaryEmbedding
from outputs import at_least_float32
from reference.mutants.catalogue import mutant, replace
from vision import Mistral3ForConditionalGeneration

# -------------------------------------------------------------------------------------------------- query scale


def scaling(stack: ExitStack, change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Apply the query scale (B, 1, S, 1) to rotated queries and keys in another way."""

    def make(right: Any) -> Any:
        def changed(self: Any, q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
            cos, sin, scale = tables
            return change(*MinistralAttention.rotate(self, q, k, (cos, sin)), scale)

        return changed

    replace(stack, Ministral3Attention, "rotate", make)


@mutant
def query_scale_missing(stack: ExitStack) -> None:
    """Does not scale queries by their position."""
    scaling(stack, lambda q, k, scale: (q, k))


@mutant
def query_scale_on_keys(stack: ExitStack) -> None:
    """Scales the keys instead of the queries."""
    scaling(stack, lambda q, k, scale: (q, k * scale))


@mutant
def query_scale_before_rope(stack: ExitStack) -> None:
    """Scales queries before they are rotated. Algebraically equal, as a rotation is linear; only rounding differs."""

    def make(_: Any) -> Any:
        def changed(self: Any, q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
            cos, sin, scale = tables
            return MinistralAttention.rotate(self, q * scale, k, (cos, sin))

        return changed

    replace(stack, Ministral3Attention, "rotate", make)


def scaled_at(stack: ExitStack, change: Callable[[Tensor], Tensor]) -> None:
    """Compute the query scale for other positions than the rotation."""

    def make(right: Any) -> Any:
        def changed(self: Any, x: Tensor, position_ids: Tensor) -> Any:
            cos, sin, _ = right(self, x, position_ids)
            _, _, scale = right(self, x, change(position_ids))
            return cos, sin, scale

        return changed

    replace(stack, YarnRotaryEmbedding, "forward", make)


@mutant
def query_scale_by_cache_position(stack: ExitStack) -> None:
    """Scales queries by their place in the cache; with padding or explicit positions that is another number."""
    scaled_at(stack, lambda ids: torch.arange(ids.shape[1], device=ids.device)[None])


@mutant
def query_scale_one_early(stack: ExitStack) -> None:
    """Takes floor((p + 1) / L) for floor(p / L): the scale steps one token too early."""
    scaled_at(stack, lambda ids: ids + 1)


@mutant
def query_scale_without_floor(stack: ExitStack) -> None:
    """Takes log(1 + p / L) for log(1 + floor(p / L)) in the scale of queries."""

    def make(right: Any) -> Any:
        def changed(self: Any, x: Tensor, position_ids: Tensor) -> Any:
            cos, sin, _ = right(self, x, position_ids)
            positions = position_ids.to(at_least_float32(x.dtype))
            steps = positions / self.rope["original_max_position_embeddings"]
            scale = 1 + self.rope["llama_4_scaling_beta"] * torch.log(1 + steps)
            return cos, sin, scale[:, None, :, None].to(x.dtype)

        return changed

    replace(stack, YarnRotaryEmbedding, "forward", make)


# ------------------------------------------------------------------------------------------- masks and positions


def layer_kinds(stack: ExitStack, change: Callable[[str, int | None], str]) -> None:
    """Build masks for another kind of layer."""

    def make(right: Any) -> Any:
        def changed(self: MinistralModel, kind: str, *arguments: Any) -> Any:
            return right(self, change(kind, self.config.sliding_window), *arguments)

        return changed

    replace(stack, MinistralModel, "_mask", make)


def window(stack: ExitStack, change: Callable[[int], int]) -> None:
    """Build masks for another window, where there is one."""

    def make(right: Any) -> Any:
        def changed(self: MinistralModel, *arguments: Any) -> Any:
            size = self.config.sliding_window
            if not size:
                return right(self, *arguments)
            with patch.object(self.config, "sliding_window", change(size)):
                return right(self, *arguments)

        return changed

    replace(stack, MinistralModel, "_mask", make)


@mutant
def window_plus_1(stack: ExitStack) -> None:
    """Lets a query see W keys and itself; it is W keys, itself included."""
    window(stack, lambda size: size + 1)


@mutant
def window_minus_1(stack: ExitStack) -> None:
    """Lets a query see W - 1 keys, itself included."""
    window(stack, lambda size: max(size - 1, 1))


@mutant
def window_on_all_layers(stack: ExitStack) -> None:
    """Gives every layer the window; the published params.json gives it to three of four."""
    layer_kinds(stack, lambda kind, size: "sliding_attention" if size else kind)


@mutant
def window_on_no_layer(stack: ExitStack) -> None:
    """Gives no layer a window."""
    layer_kinds(stack, lambda kind, size: "full_attention")


@mutant
def positions_through_padding(stack: ExitStack) -> None:
    """Counts positions through padding; they skip it."""

    def make(right: Any) -> Any:
        def changed(self: Any, x: Tensor, position_ids: Tensor) -> Any:
            places = torch.arange(position_ids.shape[1], device=x.device)
            return right(self, x, places.expand_as(position_ids))

        return changed

    for cls in (RotaryEmbedding, YarnRotaryEmbedding):
        replace(stack, cls, "forward", make)


@mutant
def bos_missing(stack: ExitStack) -> None:
    """Feeds the text without the first token, <s>."""

    def make(right: Any) -> Any:
        def changed(self: Any, input_ids: Tensor | None = None, *rest: Any, **named: Any) -> Any:
            if input_ids is None or input_ids.shape[1] == 1:
                return right(self, input_ids, *rest, **named)
            mask, positions = named.get("attention_mask"), named.get("position_ids")
            if mask is not None:  # in a padded text, <s> becomes padding
                named["attention_mask"] = mask[:, 1:] * mask[:, :-1]
            if positions is not None:
                named["position_ids"] = (positions[:, 1:] - 1).clamp(min=0)
            return right(self, input_ids[:, 1:], *rest, **named)

        return changed

    for cls in (MinistralForCausalLM, Mistral3ForConditionalGeneration):
        replace(stack, cls, "forward", make)


@mutant
def positions_from_1(stack: ExitStack) -> None:
    """Counts positions from 1; they start at 0. Distances are the same, so only the query scale shows it in logits."""
    replace(stack, checks, "as_positions", lambda right: lambda *arguments: right(*arguments) + 1)


@mutant
def padding_visible(stack: ExitStack) -> None:
    """Lets texts see their padding."""

    def make(right: Any) -> Any:
        def changed(self: Any, kind: str, queries: Tensor, keys: Tensor, _: Any, text_mask: Any) -> Any:
            return right(self, kind, queries, keys, None, text_mask)

        return changed

    replace(stack, MinistralModel, "_mask", make)


@mutant
def ring_slot_off_by_one(stack: ExitStack) -> None:
    """Stores a token in the slot after its own, (p + 1) % W, as soon as the ring is full. Position 0 then stays for
    W - 1 steps too many, and one of the last W keys is missing in each."""
    whole = False  # the text is computed at once, without a cache

    def make_update(right: Any) -> Any:
        def changed(self: SlidingLayerCache, k: Tensor, v: Tensor) -> Any:
            if k.shape[2] > 1 or self.length < self.window:
                return right(self, k, v)
            self.length += 1  # of which the slot is computed
            keys_and_values = right(self, k, v)
            self.length -= 1
            return keys_and_values

        return changed

    def make_choice(right: Any) -> Any:
        def changed(self: MinistralModel, *arguments: Any) -> KVCache | None:
            nonlocal whole
            cache: KVCache | None = right(self, *arguments)
            whole = cache is None
            return cache

        return changed

    # A text at once: the mask of a port that decodes it token by token.
    def make_mask(right: Any) -> Any:
        def changed(self: MinistralModel, kind: str, queries: Tensor, *rest: Any) -> Any:
            mask = right(self, kind, queries, *rest)
            if not whole or kind != "sliding_attention" or not isinstance(mask, Tensor):
                return mask
            mask = mask.clone()
            window = self.config.sliding_window
            assert window is not None
            for p in range(window, min(2 * window - 1, queries.shape[0])):
                mask[..., p, 0] = mask[..., 0, 0]
                mask[..., p, p - window + 1] = False
            return mask

        return changed

    replace(stack, SlidingLayerCache, "update", make_update)
    replace(stack, MinistralModel, "_choose_cache", make_choice)
    replace(stack, MinistralModel, "_mask", make_mask)
