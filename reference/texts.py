"""One text of a reference: for ports that have no batches or no padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.trace import dimensions

Trace = Mapping[str, Tensor]


def visible_tokens(inputs: Trace) -> Tensor:
    """bool (B, S), False at padding."""
    ids = inputs["input_ids"]
    return inputs.get("attention_mask", torch.ones_like(ids)).bool()


def choose_text(port: Trace, inputs: Trace, given: int | None) -> int | None:
    """The number of the text that a port computed, from 0; None: all of them, as the reference has them.

    Args:
        port: its tensors; `input.input_ids`, if it is there, may be the ids of one text.
        inputs: the reference's inputs.
        given: the number that the user gives.

    Raises:
        ValueError: the reference has no such text, or has images, or does not name its ids.
    """
    if "input_ids" not in inputs:
        if given is not None:
            raise ValueError(f"--text {given}: the reference does not hold input.input_ids; compare all texts")
        return None
    ids, visible = inputs["input_ids"], visible_tokens(inputs)
    count = len(ids)
    if given is not None:
        if not 0 <= given < count:
            raise ValueError(f"--text {given} is impossible; allowed: 0 to {count - 1}, one of the reference's texts")
        if "pixel_values" in inputs:
            raise ValueError(f"--text {given}: the reference has images, which belong to all texts; compare them all")
        if "step_lengths" in inputs:
            raise ValueError(f"--text {given}: the reference is a decoding trace; compare all of it")
        return given
    own = port.get("input.input_ids")
    if own is None or "pixel_values" in inputs or own.numel() == ids.numel():
        return None
    alike = [n for n in range(count) if torch.equal(own.flatten(), ids[n][visible[n]].to(own.dtype))]
    if not alike:
        return None
    return alike[0]


def one_text(reference: Trace, inputs: Trace, text: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference and its inputs without the other texts and without padding: B is 1, and S and T are the number of
    the text's tokens. Positions stay what they are."""
    ids = inputs["input_ids"]
    B, S = ids.shape
    visible = visible_tokens(inputs)[text]
    positions = inputs.get("position_ids", torch.arange(S)).expand(B, S)
    chosen = {"input_ids": ids[text][visible][None], "position_ids": positions[text][visible][None]}
    traced = {}
    for name, tensor in reference.items():
        for axis, dimension in enumerate(dimensions(name).split()):
            if dimension == "B":
                tensor = tensor.narrow(axis, text, 1)
            elif dimension in ("S", "T"):
                tensor = tensor.index_select(axis, visible.nonzero()[:, 0])
        traced[name] = tensor
    return traced, chosen


def texts_in_words(inputs: Trace) -> str:
    """The first ids of every text: "0: 1, 7, 12, ...; 1: 1, 9, ..."."""
    words = []
    for number, (ids, visible) in enumerate(zip(inputs["input_ids"], visible_tokens(inputs))):
        shown = ids[visible].tolist()
        first = ", ".join(map(str, shown[:4]))
        words.append(f"{number}: {first}, ... ({len(shown)} tokens)")
    return "; ".join(words)
