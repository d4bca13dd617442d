"""What is suspicious about a port's inputs: other ids, padding that it does not know of, another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference import golden
from reference.compare import Report, compare, computed_in
from reference.judge import Judge, Types, is_small
from reference.texts import one_text
from reference.trace import load, take_inputs

Trace = Mapping[str, Tensor]
# The relative error up to which numbers are those of another golden model, in float32 and in 16 bits.
CLOSE, CLOSE_IN_16_BITS = 1e-3, 0.3


def check_inputs(mine: Path, reference: Path, port: Trace, inputs: Trace) -> None:
    """Raise ValueError unless the port's inputs, as far as they are given, are the reference's, but at padding.

    Args:
        mine, reference: the two files.
        port: the port's tensors.
        inputs: the reference's.
    """
    if "input_ids" not in inputs:
        return
    ids = inputs["input_ids"]
    B, S = ids.shape
    padding_mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    everything = torch.ones_like(padding_mask)
    positions = inputs.get("position_ids", torch.arange(S)).expand(B, S)
    mask = inputs.get("attention_mask", everything)
    for name, expected, counted in (
        ("input_ids", ids, everything),
        ("attention_mask", mask, everything),
        ("position_ids", positions, padding_mask),
    ):
        given = port.get(f"input.{name}")
        if given is None:
            continue
        wrong = f"{mine} is about other {name} than {reference}"
        if given.numel() not in (B * S, S):
            raise ValueError(f"{wrong}: {list(given.shape)}, the reference {[B, S]}")
        rows = given.reshape(-1, S).expand(B, S)
        differs = (rows.double() != expected.double()) & counted
        if bool(differs.any()):
            text, place = differs.nonzero()[0].tolist()
            found, right = rows[text, place].item(), int(expected[text, place])
            raise ValueError(f"{wrong}: text {text}, token {place}: {found}, the reference {right}")


def suspicions(path: Path, judge: Judge, report: Report, types: Types, text: int | None) -> list[str]:
    """Sentences about what is suspicious about the inputs of a port that diverges.

    Args:
        path: of the reference.
        judge: the port, the reference and its model.
        report: of their comparison.
        types: of each stage.
        text: the one text that is compared.
    """
    hints = [*other_sizes(judge), *other_ids(judge, report), *padded_texts(judge, types)]
    hints += log_probabilities(judge, report)
    if not hints:
        hints += other_models(path, judge.port, text)
    return hints


def other_sizes(judge: Judge) -> Iterator[str]:
    """A sentence if the port has another vocabulary or hidden size."""
    for name, size in (("logits", "vocabulary"), ("embedding", "hidden size"), ("final_norm", "hidden size")):
        if name not in judge.port or name not in judge.reference:
            continue
        sizes = list(judge.port[name].shape)
        expected = judge.reference[name].shape[-1]
        if sizes and expected not in sizes and max(sizes) < expected:
            yield f"your {name} are {sizes}, and the reference's {size} is {expected}: is it another model?"
            return


def other_ids(judge: Judge, report: Report) -> Iterator[str]:
    """A sentence if the port's embeddings are those of other ids."""
    model = judge.model(torch.float64)
    if report.first != "embedding" or "pixel_values" in judge.inputs or not is_small(model):
        return
    embeddings, counted = report.fitted["embedding"]
    ids = judge.inputs["input_ids"]
    table: Any = model.get_input_embeddings()
    weights = table.weight.detach()
    distances = torch.cdist(embeddings.double(), weights.expand(len(ids), -1, -1))  # (B, S, V)
    nearest, found = distances.min(-1)
    visible = counted[..., 0]
    alike = nearest <= 0.1 * weights.norm(dim=-1).mean()
    differs = (found != ids) & visible
    if bool(differs.any()) and bool(alike[visible].all()):
        text, place = differs.nonzero()[0].tolist()
        wrong, right = int(found[text, place]), int(ids[text, place])
        count = f"{int(differs.sum())} of {int(visible.sum())} tokens differ"
        yield (
            f"your embeddings are those of other ids: text {text}, token {place}: {wrong}, the reference {right} "
            f"({count})"
        )


def log_probabilities(judge: Judge, report: Report) -> Iterator[str]:
    """A sentence if the port's logits differ from the right ones by one number for each token."""
    if report.first != "logits":
        return
    logits, counted = report.fitted["logits"]
    right = judge.reference["logits"].double()
    differences = (logits.double() - right)[counted.all(-1)]  # (tokens, V)
    allowed = CLOSE * right.abs().max()
    alike = bool((differences.std(-1) <= allowed).all())
    if len(differences) and alike and bool((differences.mean(-1).abs() > allowed).any()):
        yield "your logits differ from the right ones by one number for each token: are they log-probabilities?"


def padded_texts(judge: Judge, types: Types) -> Iterator[str]:
    """A sentence if the port diverges in padded texts only."""
    mask = judge.padding_mask
    if mask is None:
        return
    full = mask.all(1)
    if bool(full.all()) or not bool(full.any()):
        return
    if judge.compare(types, padding_mask=mask & full[:, None]).agrees:
        padded = (~full).nonzero().flatten().tolist()
        numbers = ", ".join(map(str, padded))
        count = int((~mask[padded[0]]).sum())
        yield (
            f"the texts without padding agree; text {numbers} is padded, with {count} tokens of padding: give "
            "your port input.attention_mask and input.position_ids, or compare one text with --text N"
        )


def other_models(path: Path, port: Trace, text: int | None) -> Iterator[str]:
    """A sentence about the other golden model that the port agrees with, the nearest one."""
    distances = {}
    for other in sorted(golden.HERE.glob("**/float64.safetensors")):
        if other.resolve() == path.resolve():
            continue
        reference, _ = load(other)
        inputs = take_inputs(reference)
        if text is not None:
            if "pixel_values" in inputs or text >= len(inputs["input_ids"]):
                continue
            reference, inputs = one_text(reference, inputs, text)
        report = compare_roughly(port, reference, inputs.get("attention_mask"))
        if report.agrees:
            distances[other] = max(stage.relative for stage in report.stages)
    if distances:
        nearest = min(distances, key=lambda other: distances[other])
        yield f"your numbers agree with {nearest}: is that the model that your port runs?"


def compare_roughly(port: Trace, reference: Trace, mask: Tensor | None) -> Report:
    """The report that tells one model from another; no noise is measured."""
    if mask is not None:
        mask = mask.bool()
    relative = {}
    for name, dtype in computed_in(port, reference).items():
        relative[name] = CLOSE
        if dtype in (torch.float16, torch.bfloat16):
            relative[name] = CLOSE_IN_16_BITS
    return compare(port, reference, {}, mask, relative, margin=1.0)
