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
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import DTYPES, Parser, exit_code, find
from generate import BUNDLED, GenerativeModel, load_model, read_picture
from reference import golden
from reference.compare import Report, compare, explain, plot, table
from reference.mutants import MUTANTS
from reference.trace import load, order, record, save
from tokenizer import Tokenizer
from vision import batch_images


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
    directory = find(options.model)
    model = load_model(directory, DTYPES[options.dtype])
    inputs: dict[str, Tensor] = {}
    if options.ids is not None:
        if not re.fullmatch(r"\d+(,\d+)*", options.ids):
            raise ValueError(f"--ids {options.ids!r} is impossible; allowed: whole numbers with commas between them")
        ids = [int(i) for i in options.ids.split(",")]
    else:
        tokenizer = Tokenizer.from_dir(directory)
        pictures = [read_picture(source, model.config, tokenizer) for source in options.image]
        ids = tokenizer.encode("") + [i for _, tokens in pictures for i in tokens]
        ids += tokenizer.encode(options.prompt, bos=False)
        if pictures:
            pixels, sizes = batch_images([pixels for pixels, _ in pictures])
            inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
    inputs |= {"input_ids": torch.tensor([ids])}
    if options.positions is not None:
        inputs["position_ids"] = positions(options.positions, len(ids))
    try:
        keep = re.compile(options.keep).search
    except re.error as error:
        raise ValueError(f"--keep {options.keep!r} is no regular expression: {error}") from error
    trace = record(model, keep=lambda name: bool(keep(name)), **golden.arguments(inputs, DTYPES[options.dtype]))
    about = {"model": str(directory.resolve()), "prompt": options.prompt, "dtype": options.dtype}
    save(options.output, trace, inputs, about)
    print(f"{len(trace)} tensors in {options.output}", file=sys.stderr)
    return 0


def read_stranger(options: argparse.Namespace) -> dict[str, Tensor]:
    """The stranger's tensors, under the names of the map, each in the type it was computed in (see `narrowest`)."""
    mine, _ = load(options.mine)
    if options.map is not None:
        try:
            names = json.loads(options.map.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{options.map} must hold a JSON object: your name -> the reference's") from error
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{options.map} must hold a JSON object: your name -> the reference's")
        if lost := sorted(names.keys() - mine.keys()):
            raise ValueError(f"{options.map} names {lost[0]!r}, which {options.mine} does not hold")
        renamed = [names.get(name, name) for name in mine]
        if twice := sorted({name for name in renamed if renamed.count(name) > 1}):
            raise ValueError(f"{options.map} gives several tensors the name {twice[0]!r}; allowed: one")
        mine = dict(zip(renamed, mine.values()))
    if odd := sorted(name for name, tensor in mine.items() if tensor.is_complex() or tensor.numel() == 0):
        raise ValueError(f"{options.mine}: {odd[0]} is complex or empty; allowed: real numbers")
    return {name: narrowest(mine[name]) for name in order(mine)}


def narrowest(tensor: Tensor) -> Tensor:
    """A tensor in the narrowest of bfloat16, float16, float32 and float64 that holds all its numbers: what was computed
    in bfloat16 may be stored as float32, which .npz files make one do."""
    if tensor.is_floating_point():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if tensor.to(dtype).double().equal(tensor.double()):
                return tensor.to(dtype)
    return tensor


SMALL = 10**7  # parameters up to which known mistakes are tried even where nothing diverges


def diff(options: argparse.Namespace) -> int:
    """`diff`: 0 if all stages agree, 1 if one diverges."""
    (reference, about), mine = load(options.reference), read_stranger(options)
    inputs = {n.removeprefix("input."): reference.pop(n) for n in list(reference) if n.startswith("input.")}
    if wrong := [n for n, t in reference.items() if t.is_floating_point() and t.dtype != torch.float64]:
        found = str(reference[wrong[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{options.reference}: {wrong[0]} is {found}; allowed: a float64 trace (is it the other way?)")
    ids = mine.get("input.input_ids")
    if ids is not None and "input_ids" in inputs and not torch.equal(ids.long(), inputs["input_ids"].long()):
        raise ValueError(f"{options.mine} is about other input_ids than {options.reference}")
    if options.model is not None and not Path(options.model).is_dir():
        raise FileNotFoundError(f"no model directory {options.model}")
    place = options.model or about.get("model")
    places = [options.reference.parent / place, Path(place)] if isinstance(place, str) else []
    directory = next((path for path in places if path.is_dir()), None)
    noise: dict[str, Tensor] = {}
    exact: GenerativeModel | None = None
    model: Callable[[torch.dtype], GenerativeModel] | None = None
    if directory is None or "input_ids" not in inputs:
        said = f"no model at {place}: no floor of noise (1 % is taken), no known mistakes"
        print(f"{said}; give --model", file=sys.stderr)
    else:
        model = cache(partial(load_model, directory))  # once in each type
        exact, known = model(torch.float64), [name for name in mine if name in reference]
        again = record(exact, keep=known.__contains__, **golden.arguments(inputs, torch.float64))
        for name in known:
            same = name in again and again[name].shape == reference[name].shape
            if not same or not torch.allclose(again[name].double(), reference[name].double(), rtol=1e-6, atol=1e-6):
                raise ValueError(f"the model in {directory} did not make {options.reference}: {name} differs")
        for dtype in {mine[name].dtype for name in known if mine[name].is_floating_point()}:
            kept = {name for name in known if mine[name].dtype in (dtype, torch.bool)}
            noise |= record(model(dtype), keep=kept.__contains__, **golden.arguments(inputs, dtype))
    mask = inputs.get("attention_mask")
    report = compare(mine, reference, noise, None if mask is None else mask.bool())
    small = exact is not None and sum(p.numel() for p in exact.parameters()) <= SMALL
    if exact is not None and model is not None and (report.first or report.misshapen or small):
        compared = [s.name for s in report.stages if not s.name.endswith(".mask")]
        fitted = {"logits": mine["logits"]} if "logits" in mine else {}
        tried = [*compared[-1:], *(name for name in compared if name == report.first), *fitted]
        for name in dict.fromkeys(tried):
            tensor = (fitted | report.fitted)[name]
            if report.mutant is None and tensor.is_floating_point():
                given = golden.arguments(inputs, torch.float64)
                report.mutant, report.verdict = explain(tensor, model(tensor.dtype), exact, given, name)
        if report.mutant and not report.first and not report.misshapen:
            report.verdict = f"within the noise of its type, but {report.verdict}"
    if options.plot is not None:
        plot(report, options.plot)
    if options.json:
        print(report.to_json())
    else:
        show(report)
    return 1 if report.first or report.misshapen or not report.stages else 0


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
