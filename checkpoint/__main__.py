"""The commands `python -m checkpoint info`, `python -m checkpoint convert` and `python -m checkpoint merge`."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cli import Parser, exit_code, format_bytes

from .adapter import Adapter
from .conversion import convert, expect_new
from .expected import count_by_part, empty_model
from .files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONSOLIDATED,
    CONSOLIDATED_INDEX,
    FORMATS,
    INDEX,
    WEIGHTS,
    has_any,
    layout,
)
from .fp8 import FP8
from .hf import text_config
from .hub import find
from .load import list_names
from .merge import merge
from .reader import DTYPES, Checkpoint, named_dtype, read_config
from .writer import leftovers

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # of DTYPES


def describe(directory: Path) -> list[str]:
    """The sizes and types of a model, a line each, without loading weights; without weights there, from its
    configuration (raises as `Checkpoint` and `empty_model`). Of an adapter: what it is for (raises as `Adapter`)."""
    has_weights = has_any(directory, WEIGHTS, INDEX, CONSOLIDATED, CONSOLIDATED_INDEX)
    if has_any(directory, ADAPTER) and has_any(directory, ADAPTER_WEIGHTS) and not has_weights:
        return _format(_describe_adapter(Adapter(directory)))
    content = read_config(directory)
    model = empty_model(content)
    config = model.config.get_text_config()
    expected = count_by_part(model)
    total_expected = sum(expected.values()) - expected["fp8"]
    sizes = f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}"

    dtype: torch.dtype
    if has_weights:
        files = Checkpoint(directory, raw=True)
        dtype = files.dtype
        numbers = files.numbers
        nbytes = files.nbytes()
        source = "of tensors"
    else:
        dtype = named_dtype(content, torch.bfloat16)
        quantised = 0
        if content.get("quantization_config"):
            quantised = expected["fp8"]
        numbers = Counter({FP8: quantised, _name(dtype): total_expected - quantised})
        nbytes = quantised + (total_expected - quantised) * dtype.itemsize
        source = "not here; by its configuration"

    total = sum(numbers.values())
    parts = f"by its configuration {total_expected:,}"
    if total == total_expected:
        counts = {part: expected[part] for part in ("text", "vision", "projector")}
        parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in numbers.most_common() if count)
    context = "not given"
    if text_config(content).get("max_position_embeddings") is not None:
        context = f"{config.max_position_embeddings:,} tokens"
    lines = {
        "model": f"{content.get('model_type')}, {sizes}, {config.num_attention_heads} heads",
        "layout": "Transformers" if layout(directory) == "hf" else "Mistral",
        "parameters": f"{total:,} ({parts})",
        "weights": f"{format_bytes(nbytes)} ({nbytes:,} bytes {source}): {kinds}",
        "context": context,
        "cache": _describe_cache(config, dtype),
    }
    found = leftovers(directory)
    if found:
        contents = [file for path in found for file in (path, *path.rglob("*"))]
        size = format_bytes(sum(file.stat().st_size for file in contents if file.is_file()))
        lines["leftovers"] = f"{size} of a save that was interrupted ({list_names([path.name for path in found], 3)})"
    return _format(lines)


def _describe_adapter(adapter: Adapter) -> dict[str, str]:
    """The properties of an adapter, by their titles."""
    changes = adapter.changes.values()
    ranks = sorted({adapter.rank(change.module) for change in changes if change.A is not None})
    endings = sorted({change.module.rpartition(".")[2] for change in changes})
    count = sum(math.prod(adapter.shape(name)) for name in adapter.names)
    return {
        "adapter": f"LoRA of {adapter.config.get('base_model_name_or_path')}",
        "rank": f"{', '.join(map(str, ranks))} (lora_alpha {adapter.config['lora_alpha']})",
        "modules": f"{len(changes)}: {list_names(endings, 12)}",
        "parameters": f"{count:,}",
    }


def _format(lines: dict[str, str]) -> list[str]:
    """A line for each title and its value."""
    return [f"{title:11} {value}" for title, value in lines.items()]


def _describe_cache(config: Any, dtype: torch.dtype) -> str:
    """The bytes that a token takes in the cache, in words."""
    layers: int = config.num_hidden_layers
    nbytes: int = 2 * layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    described = f"{nbytes:,} bytes per token in {_name(dtype)}"
    sliding: int = config.layer_types.count("sliding_attention")
    if sliding:
        described += f", {nbytes * sliding // layers:,} of them up to {config.sliding_window:,} tokens only"
    return described


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_numbers(directory: Path) -> None:
    """Read all weights; raise ValueError if some are NaN or infinite."""
    files = Checkpoint(directory)
    names = [name for name in tqdm(files.names(), unit=" tensors", leave=False, delay=2) if not is_finite(files, name)]
    if names:
        raise ValueError(f"{directory}: {len(names)} tensors have NaN or infinite numbers: {list_names(names, 6)}")


def is_finite(files: Checkpoint, name: str) -> bool:
    """Whether all numbers of a tensor are finite."""
    return bool(files.read(name).isfinite().all())


def run(options: argparse.Namespace) -> int:
    """Run a command; returns the exit code."""
    if options.command == "info":
        lines = describe(find(options.model, options.revision, parts="config"))
        if options.check:
            check_numbers(find(options.model, options.revision))
            lines += _format({"check": "all numbers are finite"})
        print("\n".join(lines))
        return 0
    dtype = None
    if options.dtype is not None:
        dtype = DTYPES[SHORT_NAMES.get(options.dtype, options.dtype)]
    if options.command == "merge":
        merge(options.adapter, options.base, options.destination, dtype)
    else:
        destination = expect_new(options.destination)  # before a download
        convert(find(options.source, options.revision), destination, dtype, options.format)
    print(f"{options.destination} is written", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = Parser(prog="python -m checkpoint", description="Show, convert and merge model directories.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    info = commands.add_parser("info", help="sizes, types, context and cache of a model, without loading it")
    small = "of a Hub repository only the small files are fetched"
    info.add_argument("model", metavar="DIR_OR_HUB_ID", help=small)
    info.add_argument("--check", action="store_true", help="read all weights, and name those that are NaN or infinite")
    to = commands.add_parser("convert", help="write a model in another layout or type")
    to.add_argument("source", metavar="DIR_OR_HUB_ID")
    to.add_argument("destination", metavar="DIR", help="a new directory")
    to.add_argument("--format", choices=FORMATS, default="hf", help="Transformers' (default) or Mistral's")
    to.add_argument("--dtype", choices=[*DTYPES, *SHORT_NAMES], help="default: as stored, FP8 included")
    into = commands.add_parser("merge", help="write a model whose weights include a LoRA adapter")
    into.add_argument("adapter", metavar="ADAPTER", help="a directory or Hub id, in the format of PEFT")
    into.add_argument("base", metavar="BASE", help="directory or Hub id of the model that it was trained on")
    into.add_argument("destination", metavar="OUT", help="a new directory")
    into.add_argument("--dtype", choices=[*DTYPES, *SHORT_NAMES], help="default: as the base is stored")
    for command in (info, to):
        command.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub repository")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
