"""Record traces, compare a port with one, rebuild the golden ones, list the known mistakes.

    python -m reference record --model DIR --prompt TEXT -o trace.safetensors
    python -m reference diff MINE REFERENCE
    python -m reference golden [--check]
    python -m reference noise
    python -m reference mutants
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import DTYPES, find
from cli import Parser, exit_code
from images import batch_images, read_image
from model_types import BUNDLED, GenerativeModel, load_model
from reference import golden
from reference.compare import (
    LEAST,
    MARGIN_OF_ONE_RUN,
    Report,
    coarser,
    compare,
    computed_in,
    measure_noise,
    plot,
    table,
)
from reference.explain import explain
from reference.mutants import MUTANTS
from reference.trace import LAYER, load, record, save
from tokenizer import Tokenizer

SMALL = 10**7  # parameters up to which known mistakes are tried even where nothing diverges
INPUTS = {"input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes"}
Models = Callable[[torch.dtype], GenerativeModel]
Trace = Mapping[str, Tensor]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line (None: of this process)."""
    description = None
    if __doc__:
        description = __doc__.splitlines()[0]
    parser = Parser(prog="python -m reference", description=description)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser("record", help="write a trace: everything that a model computes for a prompt")
    bundled = str(BUNDLED)
    one.add_argument("--model", default=bundled, metavar="DIR_OR_HUB_ID", help="default: the bundled model")
    one.add_argument("--prompt", metavar="TEXT", help="the text, which <s> is put before")
    one.add_argument("--ids", metavar="1,2,3", help="token ids instead of a text")
    one.add_argument("--image", action="append", default=[], metavar="FILE", help="an image, before the text")
    one.add_argument("--positions", metavar="0,1,2 or 16380-16390", help="rotary positions of the tokens")
    one.add_argument("--dtype", choices=DTYPES, default="float64", help="default: float64")
    one.add_argument("--keep", default="", metavar="REGEX", help="names to keep; default: all")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    two = commands.add_parser("diff", help="where a port diverges first, and which known mistake that is")
    two.add_argument("mine", type=Path, metavar="MINE", help=".safetensors or .npz")
    two.add_argument("reference", type=Path, metavar="REFERENCE", help="a float64 trace")
    two.add_argument("--model", metavar="DIR", help="of the reference; default: the one that the trace names")
    two.add_argument("--map", type=Path, metavar="FILE.json", help="an object: your name -> the reference's")
    two.add_argument("--dtype", choices=DTYPES, help="the port's type, where its numbers do not show it")
    two.add_argument("--json", action="store_true", help="print one JSON object")
    plotted = "draw the error through depth (needs matplotlib)"
    two.add_argument("--plot", type=Path, metavar="OUT.png", help=plotted)
    three = commands.add_parser("golden", help="build the golden traces again")
    three.add_argument("--check", action="store_true", help="only say which files would differ")
    commands.add_parser("noise", help="print how far float32 and bfloat16 are from float64 at every stage")
    commands.add_parser("mutants", help="list the known mistakes")
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------- record


def parse_positions(text: str, count: int) -> Tensor:
    """ "0,1,5-7" -> (1, count) positions (raises ValueError)."""
    positions: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if ends is None:
            wrong = f"{part!r} is neither a number nor a range"
            raise ValueError(f"--positions {text}: {wrong}; allowed: 0,1,16380-16390")
        first = last = int(ends[1])
        if ends[2] is not None:
            last = int(ends[2])
        if last >= 2**31:
            raise ValueError(f"--positions {text}: {last} is impossible; allowed: below 2**31")
        last = min(last, first + count)  # more than enough to say that there are too many
        positions += range(first, last + 1)
    if len(positions) != count:
        allowed = f"{count}, one for each token"
        raise ValueError(f"--positions {text} has {len(positions)} numbers; allowed: {allowed}")
    return torch.tensor([positions])


def write_trace(options: argparse.Namespace) -> int:
    """Run `record`."""
    if (options.prompt is None) == (options.ids is None):
        raise ValueError("give --prompt TEXT or --ids 1,2,3, one of the two")
    if options.ids is not None and options.image:
        raise ValueError("--image goes with --prompt: the tokens of an image are put before the text")
    directory = find(options.model)
    dtype = DTYPES[options.dtype]
    model = load_model(directory, dtype)
    if options.ids is None:
        inputs = prompt_inputs(options, model, directory)
    else:
        inputs = {"input_ids": torch.tensor([parse_ids(options.ids)])}
    if options.positions is not None:
        inputs["position_ids"] = parse_positions(options.positions, inputs["input_ids"].shape[1])
    try:
        pattern = re.compile(options.keep)
    except re.error as error:
        raise ValueError(f"--keep {options.keep!r} is no regular expression: {error}") from error

    def keep(name: str) -> bool:
        return pattern.search(name) is not None

    trace = record(model, keep=keep, **golden.arguments(inputs, dtype))
    if not trace:
        raise ValueError(f"--keep {options.keep!r} matches no name; allowed: what reference/trace.py lists")
    about = {"model": str(directory.resolve()), "prompt": options.prompt, "dtype": options.dtype}
    save(options.output, trace, inputs, about)
    print(f"{len(trace)} tensors in {options.output}", file=sys.stderr)
    return 0


def parse_ids(text: str) -> list[int]:
    """ "1,2,3" -> ids (raises ValueError)."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--ids {text!r} is impossible; allowed: whole numbers with commas between them")
    return [int(number) for number in text.split(",")]


def prompt_inputs(
    options: argparse.Namespace, model: GenerativeModel, directory: Path
) -> dict[str, Tensor]:  # fmt: skip
    """<s>, the tokens of the images, and the text; and the images."""
    tokenizer = Tokenizer.from_dir(directory)
    ids = tokenizer.encode("")
    images = []
    for source in options.image:
        pixels, image_ids = read_image(source, model.config, tokenizer)
        images.append(pixels)
        ids += image_ids
    ids += tokenizer.encode(options.prompt, bos=False)
    inputs: dict[str, Tensor] = {}
    if images:
        pixel_values, sizes = batch_images(images)
        inputs = {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes)}
    inputs["input_ids"] = torch.tensor([ids])
    return inputs


# --------------------------------------------------------------------------------------------- diff: the two files


def read_map(path: Path, given: Collection[str]) -> dict[str, str]:
    """A port's names -> the reference's.

    Names that are not given are left out, so that one map is enough for all dumps. If none is given, it is the wrong
    map.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object: your name -> the reference's") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} must hold a JSON object: your name -> the reference's")
    if names and not names.keys() & set(given):
        raise ValueError(f"{path} names {next(iter(names))!r} and others; allowed: some that your file holds")
    renamed = [names.get(name, name) for name in given]
    twice = sorted(name for name, count in Counter(renamed).items() if count > 1)
    if twice:
        raise ValueError(f"{path} gives several tensors the name {twice[0]!r}; allowed: one")
    return dict(zip(given, renamed))


def read_port(options: argparse.Namespace) -> dict[str, Tensor]:
    """The port's tensors, under the names of the map."""
    port, _ = load(options.mine)
    if options.map is not None:
        names = read_map(options.map, list(port))
        port = {names[name]: tensor for name, tensor in port.items()}
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
    names = [name for name in reference if name.startswith("input.")]
    inputs = {name.removeprefix("input."): reference.pop(name) for name in names}
    unknown = sorted(inputs.keys() - INPUTS)
    if unknown:
        raise ValueError(f"{path}: input.{unknown[0]} is no input; allowed: {', '.join(sorted(INPUTS))}")
    if "input_ids" in inputs and inputs["input_ids"].is_floating_point():
        raise ValueError(f"{path}: input.input_ids are not whole numbers")
    for name, tensor in reference.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name} is {kind}; allowed: a float64 trace (is it the other way?)")
    return reference, inputs, about


def check_inputs(options: argparse.Namespace, port: Trace, inputs: Trace) -> None:
    """Raise ValueError unless the port's inputs, as far as they are given, are the reference's, but at padding."""
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
        wrong = f"{options.mine} is about other {name} than {options.reference}"
        if given.numel() not in (B * S, S):
            raise ValueError(f"{wrong}: {list(given.shape)}")
        same = given.reshape(-1, S).expand(B, S).double() == expected.double()
        if not bool(same[counted].all()):
            raise ValueError(wrong)


# ------------------------------------------------------------------------------------------- diff: the comparison


def reference_model(options: argparse.Namespace, about: Mapping[str, Any]) -> tuple[Models | None, str]:
    """The model that made the reference, in any type, or None if it is not there; and its directory."""
    if options.model is not None and not Path(options.model).is_dir():
        raise FileNotFoundError(f"no model directory {options.model}")
    place = about.get("model")
    if options.model:
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


def traces_beside(options: argparse.Namespace, ids: Tensor | None) -> dict[str, dict[str, Tensor]]:
    """Traces of the reference's model in other types, if they lie beside the reference: type -> names -> tensors."""
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
            traces[kind] = trace
    return traces


def compare_without_model(
    port: Trace, reference: Trace, types: Mapping[str, torch.dtype], padding_mask: Tensor | None,
    traces: Mapping[str, Trace], place: str,
) -> Report:  # fmt: skip
    """Compare with the noise of traces in the port's type, or else of the golden models.

    For float16 it is that of bfloat16, which is coarser. Both are a single run, so the margin is wider.
    """
    noise: dict[str, Tensor] = {}
    relative: dict[str, float] = {}
    measured = golden.noise()
    for name, dtype in types.items():
        general = LAYER.sub("N", name)
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
    return compare(port, reference, noise, padding_mask, relative, MARGIN_OF_ONE_RUN)


def name_mistake(
    report: Report, port: Trace, model: Models, inputs: Trace, types: Mapping[str, torch.dtype]
) -> None:  # fmt: skip
    """Look for the known mistake behind a divergence, or, in small models, behind numbers within the noise."""
    exact = model(torch.float64)
    diverges = not report.agrees
    if not diverges and sum(parameter.numel() for parameter in exact.parameters()) > SMALL:
        return
    given = golden.arguments(inputs, torch.float64)
    compared = [name for name in report.fitted if name in types]
    names = compared[-1:]
    if report.first in compared:
        names.append(report.first)
    names.append("logits")
    for name in dict.fromkeys(names):
        if name not in types or report.mutant is not None:
            continue
        tensor, counted = report.fitted.get(name, (port[name], None))
        mutant, verdict = explain(tensor, model(types[name]), exact, given, name, counted, report.first)
        report.mutant = mutant
        if mutant or report.first or verdict.endswith("bit for bit"):
            report.verdict = verdict
    if report.mutant and not diverges:
        report.verdict = f"within the noise of its type, but {report.verdict}"


def compare_with_model(
    options: argparse.Namespace,
    port: Trace,
    reference: Trace,
    inputs: Trace,
    types: Mapping[str, torch.dtype],
    padding_mask: Tensor | None,
    model: Models,
    place: str,
) -> Report:
    """Compare with the noise that the model has, and look for the known mistake."""
    known = {name: reference[name] for name in port if name in reference}
    given = golden.arguments(inputs, torch.float64)
    computed = record(model(torch.float64), keep=known.__contains__, **given)
    check_model(place, options.reference, computed, known)

    def compare_in(types: Mapping[str, torch.dtype]) -> Report:
        noise: dict[str, Tensor] = {}
        for dtype in set(types.values()):
            stages = {name: reference[name] for name in types if types[name] == dtype}
            noise |= measure_noise(model(dtype), stages, golden.arguments(inputs, dtype))
        return compare(port, reference, noise, padding_mask)

    report = compare_in(types)
    name_mistake(report, port, model, inputs, types)
    unexplained = not report.agrees and not report.mutant and options.dtype is None
    if unexplained and compare_in(dict.fromkeys(types, torch.bfloat16)).agrees:
        advice = "if that is its type, say --dtype bfloat16"
        report.verdict += f"; all is within the noise of bfloat16, though: {advice}"
    return report


def diff(options: argparse.Namespace) -> int:
    """Run `diff`: 0 if all stages agree, 1 if one diverges."""
    reference, inputs, about = read_reference(options)
    port = read_port(options)
    check_inputs(options, port, inputs)
    types = computed_in(port, reference)
    if options.dtype is not None:
        types = {name: coarser(dtype, DTYPES[options.dtype]) for name, dtype in types.items()}
    model, place = reference_model(options, about)
    padding_mask = inputs.get("attention_mask")
    if padding_mask is not None:
        padding_mask = padding_mask.bool()
    if model is None or "input_ids" not in inputs:
        traces = traces_beside(options, inputs.get("input_ids"))
        report = compare_without_model(port, reference, types, padding_mask, traces, place)
    else:
        report = compare_with_model(options, port, reference, inputs, types, padding_mask, model, place)
    if options.json:
        print(report.to_json())
    else:
        show(report)
    if options.plot is not None:
        plot(report, options.plot)
    if report.agrees:
        return 0
    return 1


def show(report: Report) -> None:
    """Print the report: what diverges first, why, and all stages."""
    print(report.sentence)
    if report.verdict:
        print(report.verdict)
    for reason in report.misshapen:
        print(f"cannot be compared: {reason}")
    if report.unknown:
        print(f"names that the reference does not have: {', '.join(report.unknown[:8])} (see --map)")
    if report.missing and report.stages:
        print(f"not given: {len(report.missing)} stages, {', '.join(report.missing[:4])}, ...")
    print()
    print(table(report, sys.stdout.isatty()))


# ------------------------------------------------------------------------------------------------ other commands


def build(options: argparse.Namespace) -> int:
    """Run `golden`, in a process of its own whose arithmetic does not depend on the processor."""
    if any(os.environ.get(key) != value for key, value in golden.ENVIRONMENT.items()):
        command = [sys.executable, "-m", "reference", "golden"]
        if options.check:
            command.append("--check")
        os.execve(sys.executable, command, os.environ | golden.ENVIRONMENT)
    if not options.check:
        golden.rebuild()
        return 0
    different = golden.check()
    if different:
        print("\n".join(different))
        return 1
    print("every file comes out the same, bit for bit")
    return 0


def run(options: argparse.Namespace) -> int:
    """Run one of the commands."""
    if options.command == "noise":
        print(golden.noise_table())
        return 0
    if options.command == "mutants":
        for mutant in MUTANTS.values():
            print(f"{mutant.name:36} {mutant.mistake}")
        return 0
    commands = {"record": write_trace, "diff": diff, "golden": build}
    return commands[options.command](options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
