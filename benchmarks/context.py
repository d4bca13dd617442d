"""How cost grows with the context: time and memory for full, sliding and mixed layers, here and in Transformers.

    python -m benchmarks.context          # about 15 minutes on 2 cores; draws benchmarks/context.png

Six narrow layers (5 million parameters, window 1024), float32, sdpa. Left: milliseconds of a token after a context of
1k to 256k random keys and values. Middle: seconds to read a prompt. Right: what reading takes beside weights, cache
included, each point in a process of its own. Prompts of Transformers end at 32k: 64k would take over 20 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
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
    ids, other = prompt(model, length), common.theirs(model) if side == "theirs" else None

    def run(ids: torch.Tensor) -> None:
        if other is None:
            generate(model, ids, max_new_tokens=1, eos_token_id=())
        else:
            their_generate(other, ids, 1)

    run(ids[:, :600])
    before, start = common.reset_peak(), time.perf_counter()
    run(ids)
    print(time.perf_counter() - start, common.peak() - before)


def measure() -> dict[str, Any]:
    """All points."""
    found: dict[str, Any] = {"machine": common.machine(), "step": {}, "prompt": {}}
    for pattern in PATTERNS:
        for length in CONTEXTS:
            model = common.ours(pattern, torch.float32)
            found["step"][f"{pattern} {length}"], _ = step_seconds(model, length, steps=8, rounds=5)
            print(pattern, length, found["step"][f"{pattern} {length}"], file=sys.stderr, flush=True)
        for side, lengths in PROMPTS.items():
            for length in lengths:
                command = [sys.executable, "-m", "benchmarks.context", "--child", side, pattern, str(length)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                found["prompt"][f"{side} {pattern} {length}"] = [float(n) for n in printed[-2:]]
                print(side, pattern, length, printed, file=sys.stderr, flush=True)
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """The figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use(Path(__file__).resolve().parent.parent / "notebooks" / "ministral.mplstyle")
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.6))
    looks = dict(zip(PATTERNS, (("#1b4f8f", "o"), ("#d1740f", "s"), ("#3b8a5a", "^"))))
    for pattern, (colour, marker) in looks.items():
        for side, line in (("ours", "-"), ("theirs", ":")):
            name = f"{pattern}, {'here' if side == 'ours' else 'Transformers'}"
            look: dict[str, Any] = dict(color=colour, marker=marker, linestyle=line, label=name,
                                        markerfacecolor=colour if side == "ours" else "none")  # fmt: skip
            steps = [1000 * found["step"][f"{pattern} {n}"][side] for n in CONTEXTS]
            panels[0].loglog(CONTEXTS, steps, **look)
            lengths = PROMPTS[side]
            read = [found["prompt"][f"{side} {pattern} {n}"] for n in lengths]
            panels[1].loglog(lengths, [seconds for seconds, _ in read], **look)
            panels[2].loglog(lengths, [nbytes / 1e6 for _, nbytes in read], **look)
    titles = ("one more token", "reading a prompt", "memory of reading, cache included")
    for panel, title, unit in zip(panels, titles, ("milliseconds", "seconds", "MB beside the weights")):
        panel.set(title=title, xlabel="tokens of context", ylabel=unit)
        panel.set_xticks([2**n for n in range(10, 19, 2)], ["1k", "4k", "16k", "64k", "256k"])
        panel.minorticks_off()
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def run(options: argparse.Namespace) -> int:
    """Measure, keep the figures, draw."""
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
