"""Mistakes of layers: attention, norm, MLP, head, vision."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import ministral
from ministral import MinistralAttention, MinistralForCausalLM, MinistralMLP, MinistralModel, RMSNorm
from outputs import at_least_float32
from reference.mutants.catalogue import Namespace, mutant, replace
from vision import Mistral3ForConditionalGeneration, Mistral3PatchMerger, PixtralRotaryEmbedding

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
            h = x.to(at_least_float32(x.dtype))
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
def norm_epsilon_outside_root(stack: ExitStack) -> None:
    """Adds epsilon to the root of the mean square; it is added below the root."""

    def make(_: Any) -> Any:
        def changed(self: RMSNorm, x: Tensor) -> Tensor:
            h = x.to(at_least_float32(x.dtype))
            h = h / (h.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)
            return self.weight * h.to(x.dtype)

        return changed

    replace(stack, RMSNorm, "forward", make)


@mutant
def gate_and_up_swapped(stack: ExitStack) -> None:
    """Takes the up matrix for the gate and the gate for the up matrix."""

    def make(right: Any) -> Any:
        def changed(self: MinistralMLP, x: Tensor) -> Tensor:
            gate, up = self.gate_proj.forward, self.up_proj.forward
            with patch.object(self.gate_proj, "forward", up), patch.object(self.up_proj, "forward", gate):
                return right(self, x)

        return changed

    replace(stack, MinistralMLP, "forward", make)


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
