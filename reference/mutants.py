"""A catalogue of the mistakes that ports of these models make, each as a switch on the models of this project.

    with MUTANTS["window_plus_1"].applied():
        model(input_ids)                            # computes what the port with that mistake computes

A switch replaces a function or a method of `ministral.py`, `ministral3.py` or `vision.py` for a while; the models have
no code for it. `python -m reference mutants` lists them. `python -m reference diff` looks for the one that reproduces a
port's numbers, and the tests are checked with them: each must turn one red.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import ministral
import outputs
from checkpoint import half_split, interleave
from ministral import MinistralAttention, MinistralForCausalLM, MinistralModel, RMSNorm, RotaryEmbedding
from ministral3 import Ministral3Attention, YarnRotaryEmbedding
from vision import Mistral3ForConditionalGeneration, Mistral3PatchMerger, PixtralRotaryEmbedding

Switch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: in the words that are common for it.
        mistake: what a port with it does, and what is right.
        applied: the switch: a context manager, during which all models make this mistake.
    """

    name: str
    mistake: str
    applied: Switch


MUTANTS: dict[str, Mutant] = {}
# Right in exact arithmetic: only rounding differs.
ROUNDING = {"softmax_not_in_float32", "norm_weight_before_rounding", "query_scale_before_rope"}


def mutant(switch: Callable[[ExitStack], None]) -> Callable[[ExitStack], None]:
    """Enter a function into the catalogue.

    The function puts its replacements on a stack. Its docstring describes the mistake.
    """

    @contextmanager
    def applied() -> Iterator[None]:
        with ExitStack() as stack:
            switch(stack)
            yield

    name = switch.__name__
    assert switch.__doc__ is not None
    MUTANTS[name] = Mutant(name, switch.__doc__.rstrip("."), applied)
    return switch


def replace(stack: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute by what `make` makes of it."""
    stack.enter_context(patch.object(owner, name, make(getattr(owner, name))))


# ------------------------------------------------------------------------------------------------------- rotary


def rotation(stack: ExitStack, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Change queries and keys before they are rotated, in the text."""

    def make(right: Any) -> Any:
        def changed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            q, k = change(q, k)
            return right(q, k, cos, sin)

        return changed

    replace(stack, ministral, "apply_rotary_pos_emb", make)


def rows(x: Tensor, reorder: Callable[[Tensor, int], Tensor], heads: int) -> Tensor:
    """Reorder heads (B, heads, S, D) as `reorder` does the rows of the matrix that they come from."""
    B, count, S, D = x.shape
    flat = x.transpose(1, 2).flatten(2)  # (B, S, rows)
    order = reorder(torch.arange(count * D, device=x.device)[:, None], heads)[:, 0]
    return flat[..., order].view(B, S, count, D).transpose(1, 2)


@mutant
def rope_interleaved(stack: ExitStack) -> None:
    """Rotates neighbouring numbers of a head; weights in Transformers' order need numbers D/2 apart."""

    def change(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rows(q, half_split, q.shape[1]), rows(k, half_split, k.shape[1])

    rotation(stack, change)


@mutant
def rope_keys_not_permuted(stack: ExitStack) -> None:
    """Leaves the key matrix in Mistral's order of rows when the query matrix is brought into Transformers'."""
    rotation(stack, lambda q, k: (q, rows(k, interleave, k.shape[1])))


@mutant
def rope_keys_permuted_by_query_heads(stack: ExitStack) -> None:
    """Reorders the rows of the key matrix with the number of query heads; there are fewer key heads."""

    def change(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        H = q.shape[1]
        _, G, _, D = k.shape
        if (G * D) % (2 * H):
            return q, k
        return q, rows(rows(k, interleave, G), half_split, H)

    rotation(stack, change)


@mutant
def yarn_magnitude_1_277(stack: ExitStack) -> None:
    """Multiplies cosine and sine by 0.1 ln(factor) + 1 = 1.277; with mscale = mscale_all_dim it is 1."""

    def attention_factor(self: YarnRotaryEmbedding) -> float:
        if self.rope["rope_type"] == "default":
            return 1.0
        return 0.1 * math.log(self.rope["factor"]) + 1

    replace(stack, YarnRotaryEmbedding, "attention_factor", lambda _: attention_factor)


@mutant
def yarn_magnitude_1(stack: ExitStack) -> None:
    """Leaves YaRN's magnitude out where it is not 1: mscale_all_dim 0, or apply_scale true."""
    replace(stack, YarnRotaryEmbedding, "attention_factor", lambda _: lambda self: 1.0)


def frequencies(stack: ExitStack, change: Callable[[YarnRotaryEmbedding, Tensor, Tensor], Tensor]) -> None:
    """Compute YaRN's frequencies from the right and the plain ones (anew: modules keep them)."""

    def make(right: Any) -> Any:
        def changed(self: YarnRotaryEmbedding, dtype: torch.dtype) -> Tensor:
            plain = RotaryEmbedding.inverse_frequencies(self, dtype)
            if self.rope["rope_type"] == "default":
                return plain
            return change(self, right(self, dtype), plain)

        return changed

    def make_forward(right: Any) -> Any:
        def changed(self: YarnRotaryEmbedding, *arguments: Any) -> Any:
            with patch.object(self, "_frequencies", {}):
                return right(self, *arguments)

        return changed

    replace(stack, YarnRotaryEmbedding, "inverse_frequencies", make)
    replace(stack, YarnRotaryEmbedding, "forward", make_forward)


@mutant
def yarn_ramp_reversed(stack: ExitStack) -> None:
    """Turns the ramp around: stretches the fast pairs and leaves the slow ones."""
    frequencies(stack, lambda self, right, plain: plain + plain / self.rope["factor"] - right)


@mutant
def yarn_ends_not_rounded(stack: ExitStack) -> None:
    """Does not round the ends of the ramp to whole pairs (truncate false), or does where they are not to be."""
    right = YarnRotaryEmbedding.inverse_frequencies

    def change(self: YarnRotaryEmbedding, frequencies: Tensor, plain: Tensor) -> Tensor:
        with patch.dict(self.rope, truncate=not self.rope.get("truncate", True)):
            return right(self, plain.dtype)

    frequencies(stack, change)


@mutant
def yarn_on_positions(stack: ExitStack) -> None:
    """Divides all positions by the factor, as linear scaling does, instead of blending frequencies."""
    frequencies(stack, lambda self, right, plain: plain / self.rope["factor"])


@mutant
def yarn_missing(stack: ExitStack) -> None:
    """Leaves YaRN out below the original context; it acts at every position."""
    frequencies(stack, lambda self, right, plain: plain)


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


# ---------------------------------------------------------------------------------------- attention, norm, head


@mutant
def gqa_tiled(stack: ExitStack) -> None:
    """Gives neighbouring query heads different key heads (repeats the list of key heads, not each one)."""
    sdpa = ministral.ATTENTION["sdpa"]

    def tile(x: Tensor, groups: int) -> Tensor:
        return x.repeat(1, groups, 1, 1)

    # The fused kernel groups by itself, unless there are as many key heads as query heads.
    def tiled(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        return sdpa(q, tile(k, groups), tile(v, groups), *rest)

    replace(stack, ministral, "repeat_kv", lambda _: tile)
    stack.enter_context(patch.dict(ministral.ATTENTION, sdpa=tiled))


@mutant
def head_dim_from_hidden_size(stack: ExitStack) -> None:
    """Divides scores by the root of hidden_size / heads; head_dim is a number of its own."""

    def make(right: Any) -> Any:
        def changed(self: MinistralAttention, *arguments: Any) -> Any:
            size = self.config.hidden_size // self.config.num_attention_heads
            name = self.config.attn_implementation
            original = ministral.ATTENTION[name]

            def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, _: float, dropout: float) -> Any:
                return original(q, k, v, mask, size**-0.5, dropout)

            with patch.dict(ministral.ATTENTION, {name: attend}):
                return right(self, *arguments)

        return changed

    replace(stack, MinistralAttention, "forward", make)


@mutant
def softmax_not_in_float32(stack: ExitStack) -> None:
    """Rounds every step of the softmax to the weights' type; it is float32 for 16-bit types."""

    def softmax(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        powers = (x - x.amax(dim, keepdim=True)).exp()
        return powers / powers.sum(dim, keepdim=True)

    replace(stack, ministral, "F", lambda right: Namespace(right, softmax=softmax))


@mutant
def norm_weight_before_rounding(stack: ExitStack) -> None:
    """Multiplies by the norm's weight in float32 and rounds then; it is rounded before."""

    def make(_: Any) -> Any:
        def changed(self: RMSNorm, x: Tensor) -> Tensor:
            h = x.to(outputs.at_least_float32(x.dtype))
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
            return (self.weight * h).to(x.dtype)

        return changed

    replace(stack, RMSNorm, "forward", make)


@mutant
def norm_epsilon(stack: ExitStack) -> None:
    """Takes another epsilon in norms: 1e-6 for 1e-5, or the reverse."""

    def make(right: Any) -> Any:
        def changed(self: RMSNorm, x: Tensor) -> Tensor:
            factor = 10.0
            if self.eps > 5e-6:
                factor = 0.1
            with patch.object(self, "eps", self.eps * factor):
                return right(self, x)

        return changed

    replace(stack, RMSNorm, "forward", make)


@mutant
def head_tied(stack: ExitStack) -> None:
    """Takes the embeddings for the head though the file has a head."""

    def make(right: Any) -> Any:
        def changed(self: Any, *arguments: Any, **named: Any) -> Any:
            text = self.model
            if not isinstance(text, MinistralModel):
                text = text.language_model
            with patch.object(self.lm_head, "forward", lambda x: F.linear(x, text.embed_tokens.weight)):
                return right(self, *arguments, **named)

        return changed

    for cls in (MinistralForCausalLM, Mistral3ForConditionalGeneration):
        replace(stack, cls, "forward", make)


# ------------------------------------------------------------------------------------------------------- vision


@mutant
def merger_patch_by_patch(stack: ExitStack) -> None:
    """Appends the numbers of merged patches, patch by patch; they are interleaved, channel by channel."""

    def make(right: Any) -> Any:
        def changed(self: Mistral3PatchMerger, x: Tensor, grids: Any) -> Tensor:
            weight = self.merging_layer.weight
            size = weight.shape[0]
            weight = weight.view(size, self.merge**2, -1).transpose(1, 2).reshape(size, -1)
            with patch.object(self.merging_layer, "forward", lambda merged: F.linear(merged, weight)):
                return right(self, x, grids)

        return changed

    replace(stack, Mistral3PatchMerger, "forward", make)


@mutant
def vision_axes_swapped(stack: ExitStack) -> None:
    """Swaps the frequencies of rows and columns of patches."""

    def make(right: Any) -> Any:
        def changed(self: PixtralRotaryEmbedding, x: Tensor, position_ids: Tensor) -> Any:
            return right(self, x, position_ids.flip(-1))

        return changed

    replace(stack, PixtralRotaryEmbedding, "forward", make)


class Namespace:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **changes: Any) -> None:
        self._module = module
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        if name in self._changes:
            return self._changes[name]
        return getattr(self._module, name)
