"""One case of a comparison with Transformers: both sides generate in turn, and their logits are compared.

A streamer, which both sides accept, notes when each token arrives. The first run of each side keeps the logits, and its
times do not count. If logits differ by more than BOUNDS, or greedy tokens in float32 differ, the sides do not compute
the same. Then `Duel.notes` says so, and the times must not be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks import common

Call = Callable[..., object]  # `generate` of either side; it takes a streamer and logits processors
# The largest `distance` that rounding may cause. In bfloat16, Transformers with eager attention has a distance of 0.005
# to 0.017 from Transformers with SDPA (random models, 256 to 4096 wide, 4 to 34 layers), and a token that is left out
# makes 0.26. Wrong positions can make less than this bound. The tests in float32 find them.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass
class Run:
    """The times of one call of `generate`. It is also the call's streamer: `put` gets the prompts (B, T), then the new
    ids (B,) of each step."""

    start: float = 0.0  # of the clock `time.perf_counter`
    total: float = 0.0  # seconds
    peak: int | None = None  # bytes beside those that were in use before
    times: list[float] = field(default_factory=list)  # of each call of `put`, by the same clock
    tokens: list[torch.Tensor] = field(default_factory=list)  # the arguments of these calls
    logits: list[torch.Tensor] = field(default_factory=list)  # (B, V) of each step, if they are kept

    def put(self, ids: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())
        self.tokens.append(ids)

    def end(self) -> None:
        """Do nothing: the text is complete."""

    def keep(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor that changes nothing and keeps the logits (B, V)."""
        self.logits.append(scores.clone())
        return scores

    @property
    def first(self) -> float:
        """Seconds to the first new token."""
        return self.times[1] - self.start

    @property
    def step(self) -> float:
        """Seconds of a step, the mean from the fourth new token on. (Recording and compiling happen before.)"""
        return (self.times[-1] - self.times[3]) / (len(self.times) - 4)


def watch(call: Call, device: str, keep: bool = False) -> Run:
    """Call `generate` of either side. With `keep`, its logits are kept."""
    run = Run()
    extra: dict[str, Any] = {"streamer": run}
    if keep:
        extra["logits_processor"] = [run.keep]
    before = 0
    common.synchronize()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run.start = time.perf_counter()
    call(**extra)
    common.synchronize()
    run.total = time.perf_counter() - run.start
    if device == "cuda":
        run.peak = torch.cuda.max_memory_allocated() - before
    return run


def distance(ours: Run, theirs: Run) -> float:
    """The largest relative difference of logits, of all rows and steps: the norm of the difference over the norm. A row
    counts up to the first token that differs, because after it the texts are not the same."""
    differences = []
    same_text = torch.ones(len(theirs.logits[0]), dtype=torch.bool)  # (B,)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True), 1):
        relative = (a - b).norm(dim=-1) / b.norm(dim=-1)
        differences.append(relative.cpu()[same_text])
        same_text &= ours.tokens[step] == theirs.tokens[step]  # `tokens[0]` are the prompts
    return torch.cat(differences).max().item()


@dataclass
class Duel:
    """The runs of one case. Sides are "theirs" (Transformers), "ours", and other variants of ours.

    Attributes:
        first: the first run of each side, whose times do not count.
        later: the other runs of each side.
        distances: the distance of each side's logits from theirs.
        notes: the reason why the times of a side must not be compared; "" if they may be.
    """

    first: dict[str, Run]
    later: dict[str, list[Run]]
    distances: dict[str, float]
    notes: dict[str, str]

    def seconds(self, side: str, name: str) -> float:
        """The median of a time: `name` is "first", "step" or "total", see `Run`."""
        return statistics.median(getattr(run, name) for run in self.later[side])

    def peak(self, side: str) -> int | None:
        """The highest peak, or None if none was measured."""
        return max((run.peak for run in self.later[side] if run.peak is not None), default=None)


def difference(ours: Run, theirs: Run, logits_distance: float, dtype: torch.dtype, greedy: bool) -> str:
    """The reason why the times of two runs must not be compared; "" if they may be."""
    bound = BOUNDS[dtype]
    if not logits_distance <= bound:  # also if it is NaN
        return f"no ratio: logits differ by {logits_distance:.2g}, the bound is {bound:g}"
    same = all(torch.equal(a, b) for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    if greedy and dtype == torch.float32 and not same:
        return "no ratio: greedy tokens differ"
    return ""


def duel(
    calls: Mapping[str, Call], device: str, dtype: torch.dtype, rounds: int, greedy: bool = True
) -> Duel:
    """Run each side once and compare the logits. Then run all sides in turn, `rounds` times.

    Args:
        calls: `generate` of "theirs" and of one or more other sides, on the same prompts.
        device: "cpu" or "cuda".
        dtype: the type of the weights, which decides the bound.
        rounds: the number of runs of each side that count.
        greedy: whether the most likely tokens are taken. If not, the tokens are not compared.
    """
    first = {side: watch(call, device, keep=True) for side, call in calls.items()}
    theirs = first["theirs"]
    distances = {side: distance(run, theirs) for side, run in first.items()}
    notes = {side: difference(run, theirs, distances[side], dtype, greedy) for side, run in first.items()}
    for run in first.values():
        run.logits.clear()
    runs = {side: partial(watch, call, device) for side, call in calls.items()}
    return Duel(first, common.in_turn(runs, rounds), distances, notes)
