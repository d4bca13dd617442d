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
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat import read_image
from checkpoint import DTYPES, find
from cli import Parser, exit_code
from generate import BUNDLED, GenerativeModel, load_model
from images import batch_images
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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line (None: of this process)."""
    parser = Parser(prog="python -m reference", description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser("record", help="write what a model computes for a prompt")
    one.add_argument("--model", default=str(BUNDLED), metavar="DIR_OR_HUB_ID", help="default: the bundled model")
    one.add_argument("--prompt", metavar="TEXT", help="the text, which <s> is put before")
    one.add_argument("--ids", metavar="1,2,3", help="token ids instead of a text")
    one.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture, before the text")
    one.add_argument("--positions", metavar="0,1,2 or 16380-16390", help="rotary positions of the tokens")
    one.add_argument("--dtype", choices=DTYPES, default="float64", help="default: float64")
    one.add_argument("--keep", default="", metavar="REGEX", help="names to keep; default: all")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    two = commands.add_parser("diff", help="where a port diverges first, and which known mistake that is")
    two.add_argument("mine", type=Path, metavar="MINE", help=".safetensors or .npz")
    two.add_argument("reference", type=Path, metavar="REFERENCE", help="a float64 trace")
    two.add_argument("--model", metavar="DIR", help="of the reference; default: the one that the trace names")
    two.add_argument("--map", type=Path, metavar="FILE.json", help="an object: your name -> the reference's")
    two.add_argument("--dtype", choices=DTYPES, help="what the port computes in, where its numbers do not show it")
    two.add_argument("--json", action="store_true", help="print one JSON object")
    two.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the error through depth (needs matplotlib)")
    three = commands.add_parser("golden", help="build the golden traces again")
    three.add_argument("--check", action="store_true", help="only say which files would differ")
    commands.add_parser("noise", help="print how far float32 and bfloat16 are from float64 at every stage")
    commands.add_parser("mutants", help="list the known mistakes")
    return parser.parse_args(arguments)


def positions(text: str, count: int) -> Tensor:
    """ "0,1,5-7" -> (1, count) positions (raises ValueError)."""
    found: list[int] = []
    for part in text.split(","):
        if not (ends := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise ValueError(f"--positions {text}: {part!r} is neither a number nor a range; allowed: 0,1,16380-16390")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        found += range(first, min(last, first + count) + 1)  # more than enough to say that there are too many
        if last >= 2**31:
            raise ValueError(f"--positions {text}: {last} is impossible; allowed: below 2**31")
    if len(found) != count:
        raise ValueError(f"--positions {text} has {len(found)} numbers; allowed: {count}, one for each token")
    return torch.tensor([found])


def write_trace(options: argparse.Namespace) -> int:
    """`record`."""
    if (options.prompt is None) == (options.ids is None):
        raise ValueError("give --prompt TEXT or --ids 1,2,3, one of the two")
    if options.ids is not None and options.image:
        raise ValueError("--image goes with --prompt: the tokens of a picture are put before the text")
    directory = find(options.model)
    model = load_model(directory, DTYPES[options.dtype])
    inputs: dict[str, Tensor] = {}
    if options.ids is not None:
        if not re.fullmatch(r"\d+(,\d+)*", options.ids):
            raise ValueError(f"--ids {options.ids!r} is impossible; allowed: whole numbers with commas between them")
        ids = [int(i) for i in options.ids.split(",")]
    else:
        tokenizer = Tokenizer.from_dir(directory)
        images = [read_image(source, model.config, tokenizer) for source in options.image]
        ids = tokenizer.encode("") + [i for _, tokens in images for i in tokens]
        ids += tokenizer.encode(options.prompt, bos=False)
        if images:
            pixels, sizes = batch_images([pixels for pixels, _ in images])
            inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    inputs |= {"input_ids": torch.tensor([ids])}
    if options.positions is not None:
        inputs["position_ids"] = positions(options.positions, len(ids))
    try:
        keep = re.compile(options.keep).search
    except re.error as error:
        raise ValueError(f"--keep {options.keep!r} is no regular expression: {error}") from error
    trace = record(model, keep=lambda name: bool(keep(name)), **golden.arguments(inputs, DTYPES[options.dtype]))
    if not trace:
        raise ValueError(f"--keep {options.keep!r} matches no name; allowed: what reference/trace.py lists")
    about = {"model": str(directory.resolve()), "prompt": options.prompt, "dtype": options.dtype}
    save(options.output, trace, inputs, about)
    print(f"{len(trace)} tensors in {options.output}", file=sys.stderr)
    return 0


def read_map(path: Path, given: Collection[str]) -> dict[str, str]:
    """A stranger's names -> the reference's. Names that are not given are left out, so that one map is enough for all
    dumps; if none is, it is the wrong map."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object: your name -> the reference's") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} must hold a JSON object: your name -> the reference's")
    if names and not names.keys() & set(given):
        raise ValueError(f"{path} names {next(iter(names))!r} and others; allowed: some that your file holds")
    renamed = [names.get(name, name) for name in given]
    if twice := sorted({name for name in renamed if renamed.count(name) > 1}):
        raise ValueError(f"{path} gives several tensors the name {twice[0]!r}; allowed: one")
    return dict(zip(given, renamed))


def read_stranger(options: argparse.Namespace) -> dict[str, Tensor]:
    """The stranger's tensors, under the names of the map."""
    mine, _ = load(options.mine)
    if options.map is not None:
        names = read_map(options.map, list(mine))
        mine = {names[name]: tensor for name, tensor in mine.items()}
    if odd := sorted(name for name, tensor in mine.items() if tensor.is_complex() or tensor.numel() == 0):
        raise ValueError(f"{options.mine}: {odd[0]} is complex or empty; allowed: real numbers")
    known = {name for name in mine if name.startswith("input.") or name.endswith(".mask")}
    wide = {name for name, t in mine.items() if t.is_floating_point() and t.itemsize > 1}
    return {name: t if name in known | wide else t.double() for name, t in mine.items()}


def read_reference(options: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The reference's tensors, its inputs, and what it is about."""
    reference, about = load(options.reference)
    inputs = {n.removeprefix("input."): reference.pop(n) for n in list(reference) if n.startswith("input.")}
    if odd := sorted(inputs.keys() - INPUTS):
        raise ValueError(f"{options.reference}: input.{odd[0]} is no input; allowed: {', '.join(sorted(INPUTS))}")
    if "input_ids" in inputs and inputs["input_ids"].is_floating_point():
        raise ValueError(f"{options.reference}: input.input_ids are not whole numbers")
    if wrong := [n for n, t in reference.items() if t.is_floating_point() and t.dtype != torch.float64]:
        found = str(reference[wrong[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{options.reference}: {wrong[0]} is {found}; allowed: a float64 trace (is it the other way?)")
    return reference, inputs, about


def check_inputs(options: argparse.Namespace, mine: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    """The stranger's inputs, as far as they are given, must be the reference's, but at padding."""
    if (ids := inputs.get("input_ids")) is None:
        return
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    places = torch.arange(ids.shape[1]).expand_as(ids)
    right = {"input_ids": ids, "attention_mask": real.long(), "position_ids": places} | dict(inputs)
    for name in ("input_ids", "attention_mask", "position_ids"):
        given = mine.get(f"input.{name}")
        wanted = right[name].expand_as(ids)
        if given is None:
            continue
        if given.numel() not in (ids.numel(), ids.shape[1]):
            raise ValueError(f"{options.mine} is about other {name} than {options.reference}: {list(given.shape)}")
        counted = real if name == "position_ids" else torch.ones_like(real)
        same = given.reshape(-1, ids.shape[1]).expand_as(ids).double() == wanted.double()
        if not bool(same[counted].all()):
            raise ValueError(f"{options.mine} is about other {name} than {options.reference}")


def reference_model(options: argparse.Namespace, about: Mapping[str, Any]) -> tuple[Models | None, str]:
    """The model that made the reference, in any type, or None if it is not there; and where it was looked for."""
    if options.model is not None and not Path(options.model).is_dir():
        raise FileNotFoundError(f"no model directory {options.model}")
    place = options.model or about.get("model")
    places = [options.reference.parent / place, Path(place)] if isinstance(place, str) else []
    directory = next((path for path in places if path.is_dir()), None)
    return (None if directory is None else cache(partial(load_model, directory))), str(directory or place)


def check_model(place: str, reference: Path, found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """The model must have made the reference."""
    for name, tensor in right.items():
        same = name in found and found[name].shape == tensor.shape
        if not same or not torch.allclose(found[name].double(), tensor.double(), rtol=1e-6, atol=1e-6):
            raise ValueError(f"the model in {place} did not make {reference}: {name} differs")


def beside(options: argparse.Namespace, ids: Tensor | None) -> dict[str, dict[str, Tensor]]:
    """Traces of the reference's model in other types, if they lie beside the reference: type -> names -> tensors."""
    found = {}
    for kind in ("float32", "bfloat16"):
        path = options.reference.parent / f"{kind}.safetensors"
        if path.is_file() and not path.samefile(options.mine):
            trace, about = load(path)
            given = trace.get("input.input_ids")
            if about.get("dtype") == kind and ids is not None and given is not None and given.equal(ids):
                found[kind] = trace
    return found


def compare_without_model(
    mine: Mapping[str, Tensor], reference: Mapping[str, Tensor], types: Mapping[str, torch.dtype], real: Tensor | None,
    traces: Mapping[str, Mapping[str, Tensor]], place: str,
) -> Report:  # fmt: skip
    """Take the noise of a right port from traces in its type, or else that of the golden models (float16: of
    bfloat16, which is coarser). Both are a single run, so the margin is wider."""
    noise, relative, measured = dict[str, Tensor](), dict[str, float](), golden.noise()
    for name, dtype in types.items():
        kind = {torch.float64: "", torch.float32: "float32"}.get(dtype, "bfloat16")
        known = traces.get(kind, {}).get(name)
        if known is not None and known.shape == reference[name].shape:
            noise[name] = known
        elif not kind or kind in measured.get(LAYER.sub("N", name), {}):
            relative[name] = measured[LAYER.sub("N", name)][kind] if kind else LEAST
    taken = ["the traces beside it"] * bool(noise) + ["the table in docs/numerics.md"] * bool(relative)
    print(f"no model at {place}: the noise of a right port is that of {' and '.join(taken) or 'nothing'}, and known "
          "mistakes are not tried; give --model", file=sys.stderr)  # fmt: skip
    return compare(mine, reference, noise, real, relative, MARGIN_OF_ONE_RUN)


def accuse(
    report: Report, mine: Mapping[str, Tensor], model: Models, inputs: Mapping[str, Tensor],
    types: Mapping[str, torch.dtype],
) -> None:  # fmt: skip
    """Look for the known mistake behind a divergence, or, in small models, behind numbers within the noise."""
    exact, diverges = model(torch.float64), not report.agrees
    if not diverges and sum(p.numel() for p in exact.parameters()) > SMALL:
        return
    compared = [name for name in report.fitted if name in types]
    for name in dict.fromkeys([*compared[-1:], *(name for name in compared if name == report.first), "logits"]):
        if name in types and report.mutant is None:
            tensor, keep = report.fitted.get(name, (mine[name], None))
            given = golden.arguments(inputs, torch.float64)
            report.mutant, said = explain(tensor, model(types[name]), exact, given, name, keep, report.first)
            if report.mutant or report.first or said.endswith("bit for bit"):
                report.verdict = said
    if report.mutant and not diverges:
        report.verdict = f"within the noise of its type, but {report.verdict}"


def diff(options: argparse.Namespace) -> int:
    """`diff`: 0 if all stages agree, 1 if one diverges."""
    (reference, inputs, about), mine = read_reference(options), read_stranger(options)
    check_inputs(options, mine, inputs)
    types = computed_in(mine, reference)
    if options.dtype is not None:
        types = {name: coarser(dtype, DTYPES[options.dtype]) for name, dtype in types.items()}
    model, place = reference_model(options, about)
    mask = inputs.get("attention_mask")
    real = None if mask is None else mask.bool()
    if model is None or "input_ids" not in inputs:
        traces = beside(options, inputs.get("input_ids"))
        report = compare_without_model(mine, reference, types, real, traces, place)
    else:
        known = {name: reference[name] for name in mine if name in reference}
        again = record(model(torch.float64), keep=known.__contains__, **golden.arguments(inputs, torch.float64))
        check_model(place, options.reference, again, known)

        def noisy(types: Mapping[str, torch.dtype]) -> Report:
            noise: dict[str, Tensor] = {}
            for dtype in set(types.values()):
                stages = {name: reference[name] for name in types if types[name] == dtype}
                noise |= measure_noise(model(dtype), stages, golden.arguments(inputs, dtype))
            return compare(mine, reference, noise, real)

        report = noisy(types)
        accuse(report, mine, model, inputs, types)
        coarse = dict.fromkeys(types, torch.bfloat16)
        if not report.agrees and not report.mutant and options.dtype is None and noisy(coarse).agrees:
            report.verdict += "; all is within the noise of bfloat16, though: if that is its type, say --dtype bfloat16"
    if options.json:
        print(report.to_json())
    else:
        show(report)
    if options.plot is not None:
        plot(report, options.plot)
    return 0 if report.agrees else 1


def show(report: Report) -> None:
    """The report for people: what diverges first, why, and all stages."""
    print(report.sentence)
    if report.verdict:
        print(report.verdict)
    for said in report.misshapen:
        print(f"cannot be compared: {said}")
    if report.unknown:
        print(f"names that the reference does not have: {', '.join(report.unknown[:8])} (see --map)")
    if report.missing and report.stages:
        print(f"not given: {len(report.missing)} stages, {', '.join(report.missing[:4])}, ...")
    print()
    print(table(report, sys.stdout.isatty()))


def build(options: argparse.Namespace) -> int:
    """`golden`, in a process of its own whose arithmetic does not depend on the processor."""
    if any(os.environ.get(key) != value for key, value in golden.ENVIRONMENT.items()):
        command = [sys.executable, "-m", "reference", "golden", *(["--check"] if options.check else [])]
        os.execve(sys.executable, command, os.environ | golden.ENVIRONMENT)
    if not options.check:
        golden.rebuild()
        return 0
    different = golden.check()
    print("\n".join(different) or "every file comes out the same, bit for bit")
    return 1 if different else 0


def run(options: argparse.Namespace) -> int:
    """One of the commands."""
    if options.command == "noise":
        print(golden.noise_table())
        return 0
    if options.command == "mutants":
        for mutant in MUTANTS.values():
            print(f"{mutant.name:36} {mutant.mistake}")
        return 0
    return {"record": write_trace, "diff": diff, "golden": build}[options.command](options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
