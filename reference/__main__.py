"""Record traces, compare a port with one, rebuild the golden ones, list the known mistakes and the stages.

    python -m reference record --model DIR --prompt TEXT -o trace.safetensors
    python -m reference diff MINE REFERENCE
    python -m reference golden [--check]
    python -m reference noise
    python -m reference mutants
    python -m reference stages
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import DTYPES, expect_writable, find
from checks import brief
from cli import Parser, exit_code
from images import batch_images, read_image
from model_types import BUNDLED, GenerativeModel, load_model
from reference import golden
from reference.diff import diff
from reference.mutants import MUTANTS
from reference.names import KNOWN_MAPS
from reference.trace import POINTS, record, save
from settings import check_characters
from tokenizer import Tokenizer


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
    steps = "decode: how many tokens each step has, through the cache; default: the whole text at once"
    one.add_argument("--steps", metavar="4,1,1,3", help=steps)
    one.add_argument("--dtype", choices=DTYPES, default="float64", help="default: float64")
    one.add_argument("--keep", default="", metavar="REGEX", help="names to keep; default: all")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.safetensors")
    two = commands.add_parser("diff", help="where a port diverges first, and which known mistake that is")
    two.add_argument("mine", type=Path, metavar="MINE", help=".safetensors, .npz, or .npy (logits)")
    two.add_argument("reference", type=Path, metavar="REFERENCE", help="a float64 trace")
    two.add_argument("--model", metavar="DIR", help="of the reference; default: the one that the trace names")
    maps = f"an object, your name -> the reference's; or {', '.join(KNOWN_MAPS)}: the names of their dumps"
    two.add_argument("--map", type=Path, metavar="FILE.json", help=maps)
    two.add_argument("--dtype", choices=DTYPES, help="the port's type at all stages; default: what its numbers show")
    one_of_several = "compare only this text of the reference, counted from 0, without its padding"
    two.add_argument("--text", type=int, metavar="N", help=one_of_several)
    two.add_argument("--json", action="store_true", help="print one JSON object")
    plotted = "draw the error through depth (needs matplotlib)"
    two.add_argument("--plot", type=Path, metavar="OUT.png", help=plotted)
    three = commands.add_parser("golden", help="build the golden traces again")
    three.add_argument("--check", action="store_true", help="only say which files would differ")
    commands.add_parser("noise", help="print how far float32 and bfloat16 are from float64 at every stage")
    commands.add_parser("mutants", help="list the known mistakes")
    commands.add_parser("stages", help="list the names of the tensors in a trace, as a Markdown table")
    return parser.parse_args(arguments)


# ------------------------------------------------------------------------------------------------------- record


def parse_positions(text: str, count: int) -> Tensor:
    """ "0,1,5-7" -> (1, count) positions (raises ValueError)."""
    positions: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        if ends is None:
            wrong = f"{brief(part)} is neither a number nor a range"
            raise ValueError(f"--positions {brief(text)}: {wrong}; allowed: 0,1,16380-16390")
        first = last = int(ends[1])
        if ends[2] is not None:
            last = int(ends[2])
        if last < first:
            raise ValueError(f"--positions {text}: {part} ends before it begins; allowed: 0,1,16380-16390")
        if last >= 2**31:
            raise ValueError(f"--positions {brief(text)}: {last} is impossible; allowed: below 2**31")
        last = min(last, first + count)  # more than enough to say that there are too many
        positions += range(first, last + 1)
    if len(positions) != count:
        allowed = f"{count}, one for each token"
        raise ValueError(f"--positions {brief(text)} has {len(positions)} numbers; allowed: {allowed}")
    return torch.tensor([positions])


def write_trace(options: argparse.Namespace) -> int:
    """Run `record`."""
    if (options.prompt is None) == (options.ids is None):
        raise ValueError("give --prompt TEXT or --ids 1,2,3, one of the two")
    if options.ids is not None and options.image:
        raise ValueError("--image goes with --prompt: the tokens of an image are put before the text")
    expect_writable(options.output)
    directory = find(options.model)
    dtype = DTYPES[options.dtype]
    model = load_model(directory, dtype)
    if options.ids is None:
        inputs = prompt_inputs(options, model, directory)
    else:
        inputs = {"input_ids": torch.tensor([parse_numbers("--ids", options.ids)])}
    tokens = inputs["input_ids"].shape[1]
    limit = model.config.get_text_config().max_position_embeddings
    if tokens > limit:
        raise ValueError(f"{tokens} tokens; allowed: max_position_embeddings={limit}; shorten the prompt")
    if options.positions is not None:
        inputs["position_ids"] = parse_positions(options.positions, inputs["input_ids"].shape[1])
    if options.steps is not None:
        inputs["step_lengths"] = torch.tensor(parse_numbers("--steps", options.steps))
    try:
        pattern = re.compile(options.keep)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"--keep {brief(options.keep)} is no regular expression: {error}") from error

    def keep(name: str) -> bool:
        return pattern.search(name) is not None

    trace = record(model, keep=keep, **golden.arguments(inputs, dtype))
    if not trace:
        names = "those that `python -m reference stages` lists"
        raise ValueError(f"--keep {options.keep!r} matches no name; allowed: {names}")
    about = {"model": str(directory.resolve()), "prompt": options.prompt, "dtype": options.dtype}
    save(options.output, trace, inputs, about)
    print(f"{len(trace)} tensors in {options.output}", file=sys.stderr)
    return 0


def parse_numbers(option: str, text: str) -> list[int]:
    """ "1,2,3" -> the numbers (raises ValueError)."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        allowed = "whole numbers of up to 9 digits, with commas between them"
        raise ValueError(f"{option} {brief(text)} is impossible; allowed: {allowed}")
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
    check_characters(options.prompt, model.config.get_text_config())
    ids += tokenizer.encode(options.prompt, bos=False)
    inputs: dict[str, Tensor] = {}
    if images:
        pixel_values, sizes = batch_images(images)
        inputs = {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes)}
    inputs["input_ids"] = torch.tensor([ids])
    return inputs


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
    if options.command == "stages":
        print("| stage | dimensions | meaning |\n|---|---|---|")
        for name, (dimensions, meaning) in POINTS.items():
            print(f"| `{name}` | {dimensions} | {meaning} |")
        return 0
    commands = {"record": write_trace, "diff": diff, "golden": build}
    return commands[options.command](options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    options = parse_arguments(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
