"""Mistakes of YaRN: its magnitude, and the frequencies that it stretches."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ministral import RotaryEmbedding
from ministral3 import Ministral3Config, YarnRotaryEmbedding
from reference.mutants.catalogue import mutant, replace

Rope = dict[str, Any]  # rope_parameters


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


def magnitude_with(stack: ExitStack, changes: Rope) -> None:
    """Compute YaRN's magnitude with other values of keys."""

    def make(right: Any) -> Any:
        def changed(self: YarnRotaryEmbedding) -> float:
            with patch.dict(self.rope, changes):
                return right(self)

        return changed

    replace(stack, YarnRotaryEmbedding, "attention_factor", make)


@mutant
def yarn_attention_factor_ignored(stack: ExitStack) -> None:
    """Computes YaRN's magnitude from the other keys though the configuration has attention_factor."""
    magnitude_with(stack, {"attention_factor": None})


@mutant
def yarn_mscale_ignored(stack: ExitStack) -> None:
    """Takes 1 for mscale in YaRN's magnitude, the quotient of get(mscale) and get(mscale_all_dim)."""
    magnitude_with(stack, {"mscale": 1.0})


@mutant
def yarn_mscale_all_dim_ignored(stack: ExitStack) -> None:
    """Takes get(mscale) for YaRN's magnitude. With mscale_all_dim it is a quotient, without it mscale is not read."""

    def make(right: Any) -> Any:
        def changed(self: YarnRotaryEmbedding) -> float:
            mscale = self.rope.get("mscale")
            is_plain = self.rope["rope_type"] == "default" or self.rope.get("attention_factor") is not None
            if is_plain or mscale in (None, 0, 1):  # with 1 it is another mistake, yarn_magnitude_1_277
                return right(self)
            return 0.1 * mscale * math.log(self.rope["factor"]) + 1

        return changed

    replace(stack, YarnRotaryEmbedding, "attention_factor", make)


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


def ramp_with(stack: ExitStack, change: Callable[[Rope], Rope]) -> None:
    """Compute YaRN's frequencies with other values of keys."""
    right = YarnRotaryEmbedding.inverse_frequencies

    def changed(self: YarnRotaryEmbedding, _: Tensor, plain: Tensor) -> Tensor:
        with patch.dict(self.rope, change(self.rope)):
            return right(self, plain.dtype)

    frequencies(stack, changed)


@mutant
def yarn_ends_not_rounded(stack: ExitStack) -> None:
    """Does not round the ends of the ramp to whole pairs; they are rounded unless truncate is false."""
    ramp_with(stack, lambda rope: {"truncate": False})


@mutant
def yarn_truncate_ignored(stack: ExitStack) -> None:
    """Rounds the ends of the ramp to whole pairs though truncate is false."""
    ramp_with(stack, lambda rope: {"truncate": True})


@mutant
def yarn_betas_32_1(stack: ExitStack) -> None:
    """Takes the defaults, beta_fast 32 and beta_slow 1, for the values of the configuration."""
    ramp_with(stack, lambda rope: {"beta_fast": 32.0, "beta_slow": 1.0})


@mutant
def yarn_betas_4_1(stack: ExitStack) -> None:
    """Takes beta_fast 4 and beta_slow 1, the values of Devstral 2, for those of the configuration."""
    ramp_with(stack, lambda rope: {"beta_fast": 4.0, "beta_slow": 1.0})


@mutant
def yarn_betas_swapped(stack: ExitStack) -> None:
    """Swaps beta_fast and beta_slow."""

    def swapped(rope: Rope) -> Rope:
        given = {key: value for key, value in rope.items() if value is not None}
        betas = {**Ministral3Config.rope_defaults, **given}
        return {"beta_fast": betas["beta_slow"], "beta_slow": betas["beta_fast"]}

    ramp_with(stack, swapped)


@mutant
def yarn_on_positions(stack: ExitStack) -> None:
    """Divides all positions by the factor, as linear scaling does, instead of blending frequencies."""
    frequencies(stack, lambda self, right, plain: plain / self.rope["factor"])


@mutant
def yarn_missing(stack: ExitStack) -> None:
    """Leaves YaRN out below the original context; it acts at every position."""
    frequencies(stack, lambda self, right, plain: plain)
