"""Mistakes of rotary positions: the order of rows, theta, tables and angles in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import ministral
from checkpoint import half_split, interleave
from ministral import RotaryEmbedding
from outputs import at_least_float32
from reference.mutants.catalogue import mutant, replace


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


def theta(stack: ExitStack, value: float) -> None:
    """Compute the frequencies of the text with another theta."""

    def make(right: Any) -> Any:
        def changed(self: RotaryEmbedding, *arguments: Any) -> Any:
            parameters = {**self.config.rope_parameters, "rope_theta": value}
            with patch.multiple(self.config, rope_theta=value, rope_parameters=parameters):
                return right(self, *arguments)

        return changed

    replace(stack, RotaryEmbedding, "forward", make)


@mutant
def rope_theta_10000(stack: ExitStack) -> None:
    """Takes 10,000 for theta, as where the key is looked for in the wrong place; it is in rope_parameters."""
    theta(stack, 1e4)


@mutant
def rope_theta_1000000(stack: ExitStack) -> None:
    """Takes 1,000,000 for theta, the value of Ministral 3, for a model with another one."""
    theta(stack, 1e6)


@mutant
def rope_table_in_bfloat16(stack: ExitStack) -> None:
    """Rounds cosine and sine to bfloat16 in a model of a finer type."""

    def make(right: Any) -> Any:
        def changed(self: RotaryEmbedding, *arguments: Any) -> Any:
            return tuple(table.bfloat16().to(table.dtype) for table in right(self, *arguments))

        return changed

    replace(stack, RotaryEmbedding, "forward", make)


def angles_in(stack: ExitStack, kind: torch.dtype) -> None:
    """Round positions, frequencies and their product to a type."""

    def make(_: Any) -> Any:
        def changed(self: RotaryEmbedding, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            dtype = at_least_float32(x.dtype)
            frequencies = self.frequencies(dtype, x.device).to(kind)
            angles = (position_ids[:, None, :, None].to(kind) * frequencies).to(dtype)
            angles = torch.cat((angles, angles), dim=-1)
            factor = self.attention_factor()
            return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)

        return changed

    replace(stack, RotaryEmbedding, "forward", make)


@mutant
def rope_angles_in_float16(stack: ExitStack) -> None:
    """Multiplies positions and frequencies in float16; they are float32 in models of all types but float64."""
    angles_in(stack, torch.float16)


@mutant
def rope_angles_in_bfloat16(stack: ExitStack) -> None:
    """Multiplies positions and frequencies in bfloat16, where positions above 256 are not exact."""
    angles_in(stack, torch.bfloat16)
