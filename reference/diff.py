"""`python -m reference diff`: where a port diverges first, and which known mistake that is."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import DTYPES
from model_types import load_model
from reference import golden
from reference.compare import LEAST, MARGIN_OF_ONE_RUN, Report, compare, computed_in
from reference.explain import NEEDS_PADDING
from reference.inputs import check_inputs, suspicions
from reference.judge import Judge, Models
from reference.mutants import MUTANTS, ROUNDING
from reference.names import KNOWN_MAPS, redundant, translate
from reference.show import expect_plottable, plot, show
from reference.texts import choose_text, one_text, texts_in_words
from reference.trace import dimensions, general_name, load, record, take_inputs

INPUTS = {"input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes", "step_lengths"}
Trace = Mapping[str, Tensor]
Types = Mapping[str, torch.dtype]


# ------------------------------------------------------------------------------------------------- the two files


def read_map(path: Path, given: Collection[str]) -> dict[str, str]:
    """A port's names -> the reference's, by a file or by one of `KNOWN_MAPS`.

    Names that are not given are left out, so that one map is enough for all dumps. If none is given, it is the wrong
    map. With one of `KNOWN_MAPS`, modules that are not known are left out if their parts are given.
    """
    if str(path) in KNOWN_MAPS:
        names = translate(str(path), given)
        given = [name for name in given if name not in redundant(given)]
        if not names:
            first = next(iter(given), "no tensor")
            raise ValueError(f"--map {path} knows none of your names, {first!r} for example; give --map FILE.json")
    else:
        names = read_map_file(path)
    if names and not names.keys() & set(given):
        raise ValueError(f"{path} names {next(iter(names))!r} and others; allowed: some that your file holds")
    renamed = [names.get(name, name) for name in given]
    twice = sorted(name for name, count in Counter(renamed).items() if count > 1)
    if twice:
        raise ValueError(f"{path} gives several tensors the name {twice[0]!r}; allowed: one")
    return dict(zip(given, renamed))


def read_map_file(path: Path) -> dict[str, str]:
    """The object of a JSON file."""
    if not path.is_file():
        problem = "no such file"
        if path.is_dir():
            problem = "a directory"
        raise FileNotFoundError(f"--map {path}: {problem}; allowed: a JSON file, or {', '.join(KNOWN_MAPS)}")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold a JSON object: your name -> the reference's") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} must hold a JSON object: your name -> the reference's")
    return names


def read_port(options: argparse.Namespace) -> dict[str, Tensor]:
    """The port's tensors, under the names of the map."""
    port, _ = load(options.mine)
    if options.map is not None:
        names = read_map(options.map, list(port))
        port = {point: port[name] for name, point in names.items()}
    for name in sorted(port):
        if port[name].is_complex() or port[name].numel() == 0:
            raise ValueError(f"{options.mine}: {name} is complex or empty; allowed: real numbers")
    return {name: as_numbers(name, tensor) for name, tensor in port.items()}


def as_numbers(name: str, tensor: Tensor) -> Tensor:
    """A tensor of whole numbers, or of a type with 8 bits, as float64; inputs and masks as they are."""
    if name.startswith("input.") or name.endswith(".mask"):
        return tensor
    if tensor.is_floating_point() and tensor.itemsize > 1:
        return tensor
    return tensor.double()


def read_reference(
    options: argparse.Namespace,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The reference's tensors, its inputs, and its metadata."""
    path = options.reference
    reference, about = load(path)
    inputs = take_inputs(reference)
    unknown = sorted(inputs.keys() - INPUTS)
    if unknown:
        raise ValueError(f"{path}: input.{unknown[0]} is no input; allowed: {', '.join(sorted(INPUTS))}")
    if "input_ids" in inputs and inputs["input_ids"].is_floating_point():
        raise ValueError(f"{path}: input.input_ids are not whole numbers")
    for name, tensor in reference.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name} is {kind}; allowed: a float64 trace (is it the other way?)")
    check_shapes(path, reference)
    return reference, inputs, about


def check_shapes(path: Path, reference: Trace) -> None:
    """Raise ValueError unless every known tensor of the reference has its dimensions, each with one size throughout.
    Those that depend on a step or a layer (S, T) may differ."""
    sizes: dict[str, int] = {}
    for name, tensor in reference.items():
        letters = dimensions(name).split()
        if not letters:
            continue
        if tensor.ndim != len(letters) or 0 in tensor.shape:
            found = f"{name} has the shape {tuple(tensor.shape)}"
            raise ValueError(f"{path}: {found}; allowed: {len(letters)} dimensions ({' '.join(letters)})")
        part = name.startswith("vision.")  # its letters stand for other sizes
        for letter, size in zip(letters, tensor.shape):
            known = sizes.setdefault(f"{part} {letter}", size)
            if size != known and letter not in ("S", "T"):
                found = f"{name} has the shape {tuple(tensor.shape)}"
                raise ValueError(f"{path}: {found}, where {letter} is {size}; elsewhere {letter} is {known}")


# ------------------------------------------------------------------------------------------------ the comparison


def reference_model(options: argparse.Namespace, about: Mapping[str, Any]) -> tuple[Models | None, str]:
    """The model that made the reference, in any type, or None if it is not there; and its directory."""
    if options.model is not None and not (options.model and Path(options.model).is_dir()):
        raise FileNotFoundError(f"--model {options.model!r} is no directory; give that of the reference's model")
    place = about.get("model")
    if options.model is not None:
        place = options.model
    if isinstance(place, str):
        for directory in (options.reference.parent / place, Path(place)):
            if directory.is_dir():
                return cache(partial(load_model, directory)), str(directory)
    return None, str(place)


def check_model(place: str, path: Path, computed: Trace, reference: Trace) -> None:
    """Raise ValueError unless the model computes the reference."""
    for name, tensor in reference.items():
        same = name in computed and computed[name].shape == tensor.shape
        if not same or not torch.allclose(computed[name].double(), tensor.double(), rtol=1e-6, atol=1e-6):
            raise ValueError(f"the model in {place} did not make {path}: {name} differs")


def traces_beside(
    options: argparse.Namespace, ids: Tensor | None, text: int | None
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Traces of the reference's model in other types, if they lie beside the reference: type -> names -> tensors.

    Args:
        ids: of the reference, with all its texts.
        text: the one text that is compared.
    """
    traces: dict[str, dict[str, Tensor]] = {}
    for kind in ("float32", "bfloat16"):
        path = options.reference.parent / f"{kind}.safetensors"
        if not path.is_file() or path.samefile(options.mine):
            continue
        trace, about = load(path)
        given = trace.get("input.input_ids")
        if ids is None or given is None or about.get("dtype") != kind:
            continue
        if given.equal(ids):
            if text is not None:
                trace, _ = one_text(trace, take_inputs(trace), text)
            traces[kind] = trace
    return traces


def compare_without_model(
    port: Trace, reference: Trace, types: Types, padding_mask: Tensor | None,
    traces: Mapping[str, Trace], place: str,
) -> Report:  # fmt: skip
    """Compare with the noise of traces in the port's type, or else of the golden models.

    For float16 it is that of bfloat16, which is coarser. Both are a single run, so the margin is wider.
    """
    noise: dict[str, Tensor] = {}
    relative: dict[str, float] = {}
    measured = golden.noise()
    for name, dtype in types.items():
        general = general_name(name)
        kind = "bfloat16"
        if dtype in (torch.float64, torch.float32):
            kind = str(dtype).removeprefix("torch.")
        known = traces.get(kind, {}).get(name)
        if known is not None and known.shape == reference[name].shape:
            noise[name] = known
        elif dtype == torch.float64:
            relative[name] = LEAST
        elif kind in measured.get(general, {}):
            relative[name] = measured[general][kind]
    sources = []
    if noise:
        sources.append("the traces beside it")
    if relative:
        sources.append("the table in docs/numerics.md")
    if not sources:
        sources.append("nothing")
    noise_of = " and ".join(sources)
    print(
        f"no model at {place}: the noise of a right port is that of {noise_of}, "
        "and known mistakes are not tried; give --model",
        file=sys.stderr,
    )
    return compare(port, reference, noise, padding_mask, relative, MARGIN_OF_ONE_RUN, types)


def compare_with_model(options: argparse.Namespace, judge: Judge, types: Types, place: str) -> Report:
    """Compare with the noise that the model has, and look for the known mistake."""
    known = {name: judge.reference[name] for name in judge.port if name in judge.reference}
    given = golden.arguments(judge.inputs, torch.float64)
    computed = record(judge.model(torch.float64), keep=known.__contains__, **given)
    check_model(place, options.reference, computed, known)

    report = judge.compare(types)
    tried = judge.name_mistake(report, types)
    explained = report.agrees or report.mutant is not None
    if not explained and tried:
        explained = judge.name_pair(report, types, tried)
    if not explained and options.dtype is None:
        explained = judge.look_in_16_bits(report, types)
    if not explained and tried:
        judge.name_part(report, tried)
    if options.dtype in ("float16", "bfloat16") and report.agrees:
        start = f"in {options.dtype} this is a weaker test than in float32"
        if shows_no_16_bits(judge.port, judge.reference):
            start = f"your numbers have more digits than {options.dtype}, so this is a weaker test than without --dtype"
        sentences = [report.verdict, f"{start}{weaker_by(judge.hidden_mistakes(types))}"]
        report.verdict = "\n".join(filter(None, sentences))
    return report


def shows_no_16_bits(port: Trace, reference: Trace) -> bool:
    """Whether no number of a port is one of 16 bits, but for those that are so in the reference."""
    shown = computed_in(port, reference).values()
    return not {torch.float16, torch.bfloat16} & set(shown)


def weaker_by(hidden: list[str]) -> str:
    """The end of the sentence about a comparison in a coarse type: the known mistakes that it cannot see."""
    if not hidden:
        return f"; it would still find each of the {len(MUTANTS)} known mistakes that acts on your numbers"
    return f": its noise hides {', '.join(hidden)}"


def diff(options: argparse.Namespace) -> int:
    """Run `diff`: 0 if all stages agree, 1 if one diverges or a known mistake gives these numbers, and 2 if nothing can
    be compared."""
    if options.plot is not None:
        expect_plottable(options.plot)
    reference, inputs, about = read_reference(options)
    port = read_port(options)
    ids = inputs.get("input_ids")
    text = choose_text(port, inputs, options.text)
    if text is not None:
        print(f"compared with text {text} of the reference, without padding", file=sys.stderr)
        reference, inputs = one_text(reference, inputs, text)
    check_inputs(options.mine, options.reference, port, inputs)
    types = computed_in(port, reference)
    if options.dtype is not None:
        types = dict.fromkeys(types, DTYPES[options.dtype])
    model, place = reference_model(options, about)
    padding_mask = inputs.get("attention_mask")
    if padding_mask is not None:
        padding_mask = padding_mask.bool()
    if model is None or ids is None:
        traces = traces_beside(options, ids, text)
        report = compare_without_model(port, reference, types, padding_mask, traces, place)
    else:
        judge = Judge(port, reference, inputs, padding_mask, model)
        report = compare_with_model(options, judge, types, place)
        if not report.agrees and report.mutant in (None, *NEEDS_PADDING):
            report.hints = suspicions(options.reference, judge, report, types, text)
    if not report.stages and ids is not None and len(ids) > 1 and text is None:
        report.sentence += f". The reference has {len(ids)} texts: {texts_in_words(inputs)}; give --text N for one"
    if options.json:
        print(report.to_json())
    else:
        show(report)
    if options.plot is not None:
        plot(report, options.plot)
    if not report.stages and report.mutant is None:
        return 2
    if report.agrees and report.mutant in (None, *ROUNDING):
        return 0
    return 1
