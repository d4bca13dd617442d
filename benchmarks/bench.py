"""Speed, memory and start against Transformers, on the same weights, in turn in one process; medians.

    python -m benchmarks.bench                      # all of them, about a quarter of an hour on 2 cores
    python -m benchmarks.bench decode-135m-bf16     # the cases whose names begin so
    python -m benchmarks.bench --list

The ratio is the seconds of Transformers over ours: above 1, we are faster (for memory: its growth over ours).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import common
from checkpoint import DTYPES
from cli import Parser, exit_code, format_bytes
from generate import BUNDLED, generate
from ministral import KVCache
from tests.cases import cache_name

SHORT = {"f32": "float32", "bf16": "bfloat16"}


@dataclass
class Row:
    """One line of the table."""

    case: str
    ours: str
    theirs: str
    ratio: float
    limit: str = ""

    def __str__(self) -> str:
        return f"| {self.case} | {self.ours} | {self.theirs} | {self.ratio:.2f} | {self.limit} |"


HEAD = "| case | here | Transformers | ratio | share of the machine's limit |\n|---|---|---|---|---|"
_limits: dict[torch.dtype, tuple[float, float]] = {}


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """See `common.limits`; measured once."""
    if dtype not in _limits:
        _limits[dtype] = common.limits(dtype)
    return _limits[dtype]


def prompt(model: Any, length: int) -> torch.Tensor:
    """Random ids (1, length)."""
    high = model.config.vocab_size
    return torch.randint(3, high, (1, length), generator=torch.Generator().manual_seed(length))


def decode(name: str, kind: str, new: int, rounds: int, attn: str = "sdpa", **extra: Any) -> Row:
    """Tokens per second of `generate`, greedy, after a prompt of 32 tokens and the first new one, whose time is
    measured, too, and taken off."""
    dtype = DTYPES[SHORT[kind]]
    model = common.ours(name, dtype)
    other, ids = common.theirs(model, attn), prompt(model, 32)
    runs = dict[str, Callable[[], object]]()
    for count in (1, new + 1):
        runs[f"ours {count}"] = partial(generate, model, ids, max_new_tokens=count, eos_token_id=())
        runs[f"theirs {count}"] = partial(their_generate, other, ids, count, **extra)
    found = common.alternate(runs, rounds)
    seconds = {side: (found[f"{side} {new + 1}"] - found[f"{side} 1"]) / new for side in ("ours", "theirs")}
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read -= 0 if model.config.tie_word_embeddings else model.lm_head.weight.nbytes
    share = read / seconds["ours"] / limits(dtype)[0]
    return Row("", f"{1 / seconds['ours']:.1f} tokens/s", f"{1 / seconds['theirs']:.1f}",
               seconds["theirs"] / seconds["ours"], f"{share:.0%} of memory bandwidth")  # fmt: skip


def their_generate(other: Any, ids: torch.Tensor, new: int, **extra: Any) -> object:
    """Transformers' `generate`, greedy, that many tokens."""
    return other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                          eos_token_id=None, pad_token_id=0, **extra)  # fmt: skip


def prefill(name: str, kind: str, length: int, rounds: int) -> Row:
    """Tokens per second of reading a prompt, to the first new token."""
    dtype = DTYPES[SHORT[kind]]
    model = common.ours(name, dtype)
    other, ids = common.theirs(model), prompt(model, length)
    seconds = common.alternate({
        "ours": partial(generate, model, ids, max_new_tokens=1, eos_token_id=()),
        "theirs": partial(their_generate, other, ids, 1),
    }, rounds)  # fmt: skip
    numbers = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name)
    share = 2 * numbers * length / seconds["ours"] / limits(dtype)[1]
    limit = f"{share:.0%} of {kind} matrix rate, without attention"
    return Row("", f"{length / seconds['ours']:.0f} tokens/s", f"{length / seconds['theirs']:.0f}",
               seconds["theirs"] / seconds["ours"], limit)  # fmt: skip


@torch.inference_mode()
def step_seconds(model: Any, length: int, steps: int, rounds: int) -> tuple[dict[str, float], int]:
    """Seconds of a token after `length` tokens of random keys and values, "ours" and "theirs", and the bytes of our
    cache."""
    other, ids = common.theirs(model), prompt(model, 1)
    ours, theirs = common.our_cache(model, length), common.their_cache(model, other, length)

    given = {cache_name(other): theirs}

    def run_theirs() -> None:
        for _ in range(steps):
            other(ids, use_cache=True, **given)

    found = common.alternate({"ours": partial(more, model, ids, ours, steps), "theirs": run_theirs}, rounds)
    return {side: seconds / steps for side, seconds in found.items()}, ours.nbytes()


def more(model: Any, ids: torch.Tensor, cache: KVCache, steps: int) -> None:
    """Our `steps` more tokens after a full cache."""
    tokens = ids.expand(1, cache.get_seq_length() + 1)  # only the last one is read
    generate(model, tokens, max_new_tokens=steps, eos_token_id=(), past_key_values=cache)


def decode_at(name: str, length: int, steps: int, rounds: int) -> Row:
    """Milliseconds per token after `length` others, float32."""
    model = common.ours(name, torch.float32)
    seconds, cached = step_seconds(model, length, steps, rounds)
    each = {side: f"{value * 1000:.1f} ms" for side, value in seconds.items()}
    share = (cached + sum(p.nbytes for p in model.parameters())) / seconds["ours"] / limits(torch.float32)[0]
    ratio = seconds["theirs"] / seconds["ours"]
    return Row("", each["ours"], each["theirs"], ratio, f"{share:.0%} of memory bandwidth")


@torch.inference_mode()
def grows(name: str, short: int, long: int, steps: int, rounds: int) -> Row:
    """Our time per token at a long context over that at a short one (in the column of Transformers)."""
    model = common.ours(name, torch.float32)
    runs: dict[str, Callable[[], object]] = {
        str(length): partial(more, model, prompt(model, 1), common.our_cache(model, length), steps)
        for length in (short, long)
    }
    seconds = common.alternate(runs, rounds)
    each = [f"{seconds[key] / steps * 1000:.2f} ms" for key in runs]
    return Row("", each[1], f"(ours, {short}) {each[0]}", seconds[str(long)] / seconds[str(short)])


def child(side: str, name: str, kind: str, length: int) -> None:
    """In a process of its own: read a prompt, print by how many bytes the peak of memory grew."""
    model = common.ours(name, DTYPES[SHORT[kind]])
    ids = prompt(model, length)
    other = common.theirs(model) if side == "theirs" else None
    generate(model, ids[:, :40], max_new_tokens=2, eos_token_id=())  # what libraries take once
    before = common.reset_peak()
    if other is None:
        generate(model, ids, max_new_tokens=1, eos_token_id=())
    else:
        their_generate(other, ids, 1)
    print(common.peak() - before)


def memory(name: str, kind: str, length: int) -> Row:
    """Growth of the peak of memory while a prompt is read, cache included, each in a process of its own."""
    grown = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "benchmarks.bench", "--child", side, name, kind, str(length)]
        grown[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return Row("", format_bytes(grown["ours"]), format_bytes(grown["theirs"]), grown["theirs"] / grown["ours"])


THEIR_START = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = tokenizer("To be, or not to be", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
print(out[0].tolist())
"""


def first_byte(*command: str) -> None:
    """Run Python until it has printed something, its modules cached on disk as in any installation. (What a process
    does before it ends is not counted.)"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen([sys.executable, "-u", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env=environment) as process:  # fmt: skip
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise ValueError(f"python {' '.join(command)} printed nothing")
        process.kill()


def start(rounds: int) -> Row:
    """Seconds from the start of a process to the first token, the 135-million shape in bfloat16, command line and all;
    `import torch` alone is in the last column."""
    with tempfile.TemporaryDirectory() as directory:
        common.ours("135m", torch.bfloat16).save_pretrained(directory)
        tekken = (BUNDLED / "tekken.json").read_bytes()
        (Path(directory) / "tekken.json").write_bytes(tekken)

        seconds = common.alternate({
            "ours": partial(
                first_byte, "generate.py", "--model", directory, "--max-new-tokens", "1", "--temperature", "0", "To"
            ),
            "theirs": partial(first_byte, "-c", THEIR_START, directory),
            "torch": partial(first_byte, "-c", "import torch; print(torch)"),
        }, rounds)  # fmt: skip
    return Row("", f"{seconds['ours']:.2f} s", f"{seconds['theirs']:.2f} s", seconds["theirs"] / seconds["ours"],
               f"import torch {seconds['torch']:.2f} s")  # fmt: skip


def compiled() -> dict[str, Any]:
    """Arguments by which Transformers' `generate` compiles its step, on a CPU, too."""
    config: Any = transformers.CompileConfig(mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


CASES: dict[str, Callable[[int], Row]] = {
    "decode-bundled-f32": lambda n: decode("bundled", "f32", 128, n),
    "decode-bundled-bf16": lambda n: decode("bundled", "bf16", 128, n),
    "decode-bundled-f32, theirs eager": lambda n: decode("bundled", "f32", 128, n, "eager"),
    "decode-bundled-f32, theirs static and compiled": lambda n: decode("bundled", "f32", 128, n, **compiled()),
    "decode-mixed-f32": lambda n: decode("mixed", "f32", 128, n),
    "decode-135m-f32": lambda n: decode("135m", "f32", 32, n),
    "decode-135m-bf16": lambda n: decode("135m", "bf16", 32, n),
    "decode-3b-bf16": lambda n: decode("3b", "bf16", 6, n),
    "prefill-135m-f32-512": lambda n: prefill("135m", "f32", 512, n),
    "prefill-135m-f32-4096": lambda n: prefill("135m", "f32", 4096, n),
    "prefill-135m-bf16-512": lambda n: prefill("135m", "bf16", 512, n),
    "prefill-3b-bf16-64": lambda n: prefill("3b", "bf16", 64, n),
    "prefill-mixed-f32-512": lambda n: prefill("mixed", "f32", 512, n),
    "prefill-mixed-f32-4096": lambda n: prefill("mixed", "f32", 4096, n),
    "prefill-mixed-f32-32768": lambda n: prefill("mixed", "f32", 32768, min(n, 3)),
    "memory-mixed-f32-32768": lambda n: memory("mixed", "f32", 32768),
    "decode-at-32768-full": lambda n: decode_at("full", 32768, 8, n),
    "decode-at-32768-135m": lambda n: decode_at("135m", 32768, 3, n),
    "sliding at 32768 over 1024": lambda n: grows("sliding", 1024, 32768, 64, n),
    "start-135m-bf16": lambda n: start(n),
}  # fmt: skip


def run_case(case: str, rounds: int, threads: int) -> tuple[Row, dict[torch.dtype, tuple[float, float]]]:
    """One row, and the limits it was held against."""
    torch.set_num_threads(threads)
    row = CASES[case](rounds)
    row.case = case
    return row, _limits


def run(options: argparse.Namespace) -> int:
    """Measure and print, each case in a process of its own: what one leaves in memory slows the next."""
    if options.child:
        torch.set_num_threads(options.threads)
        side, name, kind, length = options.child
        child(side, name, kind, int(length))
        return 0
    cases = [case for case in CASES if not options.cases or case.startswith(tuple(options.cases))]
    if options.list:
        print("\n".join(cases))
        return 0
    print(f"{common.machine()}\n\n{HEAD}", flush=True)
    for case in cases:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            row, limits = pool.submit(run_case, case, options.rounds, options.threads).result()
        print(row, flush=True)
        _limits.update(limits)
    for dtype, (vector, matrix) in _limits.items():
        print(f"\nlimits in {dtype}: {vector / 1e9:.1f} GB/s of a matrix times a vector, {matrix / 1e9:.0f} GFLOPS")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.bench", description="Measure against Transformers.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="beginnings of names; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
