"""Cost against context: time and memory of full, sliding and mixed layers, here and in Transformers.

    python -m benchmarks.context          # about 15 minutes on 2 cores; draws benchmarks/context.png

Six narrow layers (5 million parameters, window 1024), float32, sdpa. Left: milliseconds of a token after a context of
1k to 256k random keys and values. Middle: seconds to read a prompt. Right: memory of reading, with the cache and
without the weights; each point has a process of its own. Prompts of Transformers end at 32k: 64k would take over 20 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.bench import prompt, step_seconds, their_generate
from cli import Parser, exit_code
from generate import generate

PATTERNS = ("full", "mixed", "sliding")
CONTEXTS = tuple(2**n for n in range(10, 19))  # 1k to 256k
PROMPTS = {"ours": tuple(2**n for n in range(10, 17)), "theirs": tuple(2**n for n in range(10, 16))}


def read_prompt(side: str, pattern: str, length: int) -> None:
    """In a process of its own: print the seconds a prompt takes, and the bytes by which the peak of memory grows."""
    model = common.ours(pattern, torch.float32)
    ids = prompt(model, length)
    read: Callable[[torch.Tensor], object] = partial(generate, model, max_new_tokens=1, eos_token_id=())
    if side == "theirs":
        read = partial(their_generate, common.theirs(model), new=1)
    read(ids[:, :600])
    before = common.reset_peak()
    start = time.perf_counter()
    read(ids)
    print(time.perf_counter() - start, common.peak() - before)


def measure() -> dict[str, Any]:
    """All points."""
    step, read = {}, {}
    for pattern in PATTERNS:
        for length in CONTEXTS:
            model = common.ours(pattern, torch.float32)
            seconds, _ = step_seconds(model, length, steps=8, rounds=5)
            step[f"{pattern} {length}"] = seconds
            print(pattern, length, seconds, file=sys.stderr, flush=True)
        for side, lengths in PROMPTS.items():
            for length in lengths:
                command = [sys.executable, "-m", "benchmarks.context", "--child", side, pattern, str(length)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                printed = done.stdout.split()
                read[f"{side} {pattern} {length}"] = [float(n) for n in printed[-2:]]
                print(side, pattern, length, printed, file=sys.stderr, flush=True)
    return {"machine": common.machine(), "step": step, "prompt": read}


def draw(points: dict[str, Any], path: Path) -> None:
    """The figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use(Path(__file__).resolve().parent.parent / "notebooks" / "ministral.mplstyle")
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6))
    styles = {"full": ("#1b4f8f", "o"), "mixed": ("#d1740f", "s"), "sliding": ("#3b8a5a", "^")}
    for pattern, (colour, marker) in styles.items():
        ours = dict(color=colour, marker=marker, markerfacecolor=colour)
        ours |= dict(linestyle="-", label=f"{pattern}, here")
        theirs = ours | dict(linestyle=":", label=f"{pattern}, Transformers", markerfacecolor="none")
        for side, style in (("ours", ours), ("theirs", theirs)):
            steps = [1000 * points["step"][f"{pattern} {n}"][side] for n in CONTEXTS]
            panels[0].loglog(CONTEXTS, steps, **style)
            lengths = PROMPTS[side]
            read = [points["prompt"][f"{side} {pattern} {n}"] for n in lengths]
            panels[1].loglog(lengths, [seconds for seconds, _ in read], **style)
            panels[2].loglog(lengths, [nbytes / 1e6 for _, nbytes in read], **style)
    panels[0].set(title="one more token", ylabel="milliseconds")
    panels[1].set(title="reading a prompt", ylabel="seconds")
    panels[2].set(title="memory of reading, cache included", ylabel="MB beside the weights")
    for panel in panels:
        panel.set(xlabel="tokens of context")
        panel.set_xticks([2**n for n in range(10, 19, 2)], ["1k", "4k", "16k", "64k", "256k"])
        panel.minorticks_off()
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def run(options: argparse.Namespace) -> int:
    """Measure, write the results to a file, draw."""
    if options.child:
        side, pattern, length = options.child
        read_prompt(side, pattern, int(length))
        return 0
    here = Path(__file__).resolve().parent
    if not options.draw:
        (here / "context.json").write_text(json.dumps(measure(), indent=1) + "\n")
    draw(json.loads((here / "context.json").read_text()), here / "context.png")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = Parser(prog="python -m benchmarks.context", description="Measure and draw cost against context.")
    parser.add_argument("--draw", action="store_true", help="only draw benchmarks/context.json again")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
