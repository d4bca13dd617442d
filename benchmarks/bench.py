"""Speed, memory and start in comparison with Transformers, on the same weights. Medians of alternating runs.

    python -m benchmarks.bench                      # all of them, about a quarter of an hour on 2 cores
    python -m benchmarks.bench decode-135m-bf16     # the cases whose names begin so
    python -m benchmarks.bench --list

The ratio is Transformers' time divided by ours (for memory: its growth divided by ours). Above 1, we are faster.
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
from generate import generate
from ministral import KVCache
from model_types import BUNDLED
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
    """`common.limits`, measured once."""
    if dtype not in _limits:
        _limits[dtype] = common.limits(dtype)
    return _limits[dtype]


def prompt(model: Any, length: int, rows: int = 1) -> torch.Tensor:
    """Random ids (rows, length)."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator).to(model.device)


def decode(
    name: str, kind: str, new: int, rounds: int, attn: str = "sdpa", rows: int = 1, **extra: Any
) -> Row:
    """Tokens per second of greedy `generate`, of all rows together. The time of the prompt (32 tokens) and of the first
    new token is measured separately and subtracted."""
    dtype = DTYPES[SHORT[kind]]
    model = common.ours(name, dtype)
    other = common.theirs(model, attn)
    ids = prompt(model, 32, rows)
    runs = dict[str, Callable[[], object]]()
    for count in (1, new + 1):
        runs[f"ours {count}"] = partial(generate, model, ids, max_new_tokens=count, eos_token_id=())
        runs[f"theirs {count}"] = partial(their_generate, other, ids, count, **extra)
    medians = common.alternate(runs, rounds)
    ours = (medians[f"ours {new + 1}"] - medians["ours 1"]) / new
    theirs = (medians[f"theirs {new + 1}"] - medians["theirs 1"]) / new
    bandwidth, _ = limits(dtype)
    limit = f"{common.step_bytes(model) / ours / bandwidth:.0%} of memory bandwidth"
    return Row("", f"{rows / ours:.1f} tokens/s", f"{rows / theirs:.1f}", theirs / ours, limit)


def their_generate(other: Any, ids: torch.Tensor, new: int, **extra: Any) -> object:
    """`new` tokens of Transformers' `generate`, greedy and without padding unless `extra` says otherwise."""
    settings: dict[str, Any] = dict(
        attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return other.generate(ids, max_new_tokens=new, **settings | extra)


def prefill(name: str, kind: str, length: int, rounds: int) -> Row:
    """Tokens per second of reading a prompt, up to the first new token."""
    dtype = DTYPES[SHORT[kind]]
    model = common.ours(name, dtype)
    other = common.theirs(model)
    ids = prompt(model, length)
    seconds = common.alternate({
        "ours": partial(generate, model, ids, max_new_tokens=1, eos_token_id=()),
        "theirs": partial(their_generate, other, ids, 1),
    }, rounds)  # fmt: skip
    ours, theirs = seconds["ours"], seconds["theirs"]
    parameters = model.named_parameters()
    numbers = sum(p.numel() for name, p in parameters if p.ndim > 1 and "embed" not in name)
    operations = 2 * numbers * length
    _, rate = limits(dtype)
    limit = f"{operations / ours / rate:.0%} of {kind} matrix rate, without attention"
    return Row("", f"{length / ours:.0f} tokens/s", f"{length / theirs:.0f}", theirs / ours, limit)


@torch.inference_mode()
def step_seconds(model: Any, length: int, steps: int, rounds: int) -> tuple[dict[str, float], int]:
    """Seconds of a token after `length` tokens of random keys and values, "ours" and "theirs", and the bytes of our
    cache."""
    other = common.theirs(model)
    ids = prompt(model, 1)
    ours = common.our_cache(model, length)
    cache = {cache_name(other): common.their_cache(model, other, length)}

    def run_theirs() -> None:
        for _ in range(steps):
            other(ids, use_cache=True, **cache)

    run_ours = partial(our_steps, model, ids, ours, steps)
    medians = common.alternate({"ours": run_ours, "theirs": run_theirs}, rounds)
    return {side: seconds / steps for side, seconds in medians.items()}, ours.nbytes()


def our_steps(model: Any, ids: torch.Tensor, cache: KVCache, steps: int) -> None:
    """Generate `steps` tokens after a cache that is filled already."""
    tokens = ids.expand(1, cache.get_seq_length() + 1)  # only the last one is read
    generate(model, tokens, max_new_tokens=steps, eos_token_id=(), past_key_values=cache)


def decode_at(name: str, length: int, steps: int, rounds: int) -> Row:
    """Milliseconds per token after `length` others, float32."""
    model = common.ours(name, torch.float32)
    seconds, cached = step_seconds(model, length, steps, rounds)
    ours, theirs = seconds["ours"], seconds["theirs"]
    nbytes = cached + sum(p.nbytes for p in model.parameters())
    bandwidth, _ = limits(torch.float32)
    limit = f"{nbytes / ours / bandwidth:.0%} of memory bandwidth"
    return Row("", f"{ours * 1000:.1f} ms", f"{theirs * 1000:.1f} ms", theirs / ours, limit)


@torch.inference_mode()
def grows(name: str, short: int, long: int, steps: int, rounds: int) -> Row:
    """Our time per token at a long context, divided by that at a short one (in the column of Transformers)."""
    model = common.ours(name, torch.float32)
    runs: dict[str, Callable[[], object]] = {
        str(length): partial(our_steps, model, prompt(model, 1), common.our_cache(model, length), steps)
        for length in (short, long)
    }
    seconds = common.alternate(runs, rounds)
    ratio = seconds[str(long)] / seconds[str(short)]
    after_short, after_long = (f"{seconds[key] / steps * 1000:.2f} ms" for key in runs)
    return Row("", after_long, f"(ours, {short}) {after_short}", ratio)


def child(side: str, name: str, kind: str, length: int) -> None:
    """In a process of its own: read a prompt, print by how many bytes the peak of memory grew."""
    model = common.ours(name, DTYPES[SHORT[kind]])
    ids = prompt(model, length)
    measured: Callable[[], object] = partial(generate, model, ids, max_new_tokens=1, eos_token_id=())
    if side == "theirs":
        measured = partial(their_generate, common.theirs(model), ids, 1)
    generate(model, ids[:, :40], max_new_tokens=2, eos_token_id=())  # libraries reserve some memory once
    before = common.reset_peak()
    measured()
    print(common.peak() - before)


def memory(name: str, kind: str, length: int) -> Row:
    """Growth of the peak of memory while a prompt is read, cache included, each in a process of its own."""
    growth = []
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "benchmarks.bench", "--child", side, name, kind, str(length)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        growth.append(int(printed.split()[-1]))
    ours, theirs = growth
    return Row("", format_bytes(ours), format_bytes(theirs), theirs / ours)


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
    """Run Python until it has printed something. Its modules are cached on disk, as in any installation. The time that
    the process takes to end is not counted."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    arguments = [sys.executable, "-u", *command]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:  # fmt: skip
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise ValueError(f"python {' '.join(command)} printed nothing")
        process.kill()


def start(rounds: int) -> Row:
    """Seconds from the start of a process to the first token, with the 135-million shape in bfloat16 and through the
    command line. The last column has `import torch` alone."""
    with tempfile.TemporaryDirectory() as directory:
        common.ours("135m", torch.bfloat16).save_pretrained(directory)
        tekken = (BUNDLED / "tekken.json").read_bytes()
        (Path(directory) / "tekken.json").write_bytes(tekken)

        seconds = common.alternate({
            "ours": partial(
                first_byte, "generate.py", "--model", directory, "--max-new-tokens", "1",
                "--temperature", "0", "To",
            ),
            "theirs": partial(first_byte, "-c", THEIR_START, directory),
            "torch": partial(first_byte, "-c", "import torch; print(torch)"),
        }, rounds)  # fmt: skip
    ours, theirs = seconds["ours"], seconds["theirs"]
    limit = f"import torch {seconds['torch']:.2f} s"
    return Row("", f"{ours:.2f} s", f"{theirs:.2f} s", theirs / ours, limit)


def compiled() -> dict[str, Any]:
    """Arguments with which Transformers' `generate` compiles its step, also on a CPU."""
    config: Any = transformers.CompileConfig(mode="default")
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


CASES: dict[str, Callable[[int], Row]] = {
    "decode-bundled-f32": lambda n: decode("bundled", "f32", 128, n),
    "decode-bundled-bf16": lambda n: decode("bundled", "bf16", 128, n),
    "decode-bundled-f32, theirs eager": lambda n: decode("bundled", "f32", 128, n, "eager"),
    "decode-bundled-f32, theirs static and compiled":
        lambda n: decode("bundled", "f32", 128, n, **compiled()),
    "decode-mixed-f32": lambda n: decode("mixed", "f32", 128, n),
    "decode-bundled-f32, batch of 8": lambda n: decode("bundled", "f32", 64, n, rows=8),
    "decode-bundled-f32, batch of 32": lambda n: decode("bundled", "f32", 32, n, rows=32),
    "decode-135m-bf16, batch of 8": lambda n: decode("135m", "bf16", 16, n, rows=8),
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
    """One row, and the limits of the machine that it states a share of."""
    torch.set_num_threads(threads)
    row = CASES[case](rounds)
    row.case = case
    return row, _limits


def run(options: argparse.Namespace) -> int:
    """Measure and print. Each case has a process of its own, because memory that one leaves behind slows the next."""
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
        bandwidth = f"{vector / 1e9:.1f} GB/s of a matrix times a vector"
        print(f"\nlimits in {dtype}: {bandwidth}, {matrix / 1e9:.0f} GFLOPS")
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
