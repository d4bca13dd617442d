"""One case of a comparison with Transformers: both sides generate in turn, and their logits are compared.

A streamer, which both sides take, notes when each token arrives. The first run of each side does not count. It keeps
the logits. Where these differ by more than BOUNDS, or greedy tokens in float32 differ, `Duel.notes` says so, and the
times must not be compared.
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
# Of `distance`. In bfloat16, Transformers' eager attention is 0.005 to 0.017 from its SDPA (random models 256 to 4096
# wide, of 4 to 34 layers), so small mistakes of positions pass: tests in float32 find those. A token left out is 0.26.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass
class Run:
    """One call of `generate`, and its streamer: `put` gets the prompts, then the new ids (B,) of each step."""

    start: float = 0.0
    total: float = 0.0
    peak: int | None = None  # bytes beside those that were in use before
    times: list[float] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

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
        """Seconds of a step, from the third new token on: what is prepared once is not in it."""
        return (self.times[-1] - self.times[3]) / (len(self.times) - 4)


def watch(call: Call, device: str, keep: bool = False) -> Run:
    """Call `generate` of either side; with `keep`, also keep its logits."""
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
    """The largest relative difference of the logits of a row: the norm of the difference over the norm. A row counts up
    to the first token that differs, because from there on the texts differ."""
    found = []
    alike = torch.ones(len(theirs.logits[0]), dtype=torch.bool)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True), 1):
        differences = (a - b).norm(dim=-1) / b.norm(dim=-1)
        found.append(differences.cpu()[alike])
        alike &= ours.tokens[step] == theirs.tokens[step]
    return torch.cat(found).max().item()


@dataclass
class Duel:
    """The runs of one case. Sides are "theirs", "ours" and other forms of ours.

    Attributes:
        first: the run of each side that does not count.
        later: the others.
        distances: of the logits of each side from theirs.
        notes: why the times of a side must not be compared; "" if they may.
    """

    first: dict[str, Run]
    later: dict[str, list[Run]]
    distances: dict[str, float]
    notes: dict[str, str]

    def seconds(self, side: str, name: str) -> float:
        """The median of a time of `Run`."""
        return statistics.median(getattr(run, name) for run in self.later[side])

    def peak(self, side: str) -> int | None:
        """The highest peak, or None if none was measured."""
        return max((run.peak for run in self.later[side] if run.peak is not None), default=None)


def difference(ours: Run, theirs: Run, far: float, dtype: torch.dtype, greedy: bool) -> str:
    """Why the times of two runs whose logits have the distance `far` must not be compared; "" if they may."""
    bound = BOUNDS[dtype]
    if not far <= bound:  # also if it is NaN
        return f"no ratio: logits differ by {far:.2g}, the bound is {bound:g}"
    same = all(torch.equal(a, b) for a, b in zip(ours.tokens, theirs.tokens, strict=True))
    if greedy and dtype == torch.float32 and not same:
        return "no ratio: greedy tokens differ"
    return ""


def duel(
    calls: Mapping[str, Call], device: str, dtype: torch.dtype, rounds: int, greedy: bool = True
) -> Duel:
    """Run all sides once and compare their logits, then in turn, `rounds` times.

    Args:
        calls: `generate` of "theirs" and of one or more other sides, on the same prompts.
        greedy: whether the most likely tokens are taken.
    """
    first = {side: watch(call, device, keep=True) for side, call in calls.items()}
    theirs = first["theirs"]
    distances = {side: distance(run, theirs) for side, run in first.items()}
    notes = {side: difference(run, theirs, distances[side], dtype, greedy) for side, run in first.items()}
    for run in first.values():
        run.logits.clear()
    runs = {side: partial(watch, call, device) for side, call in calls.items()}
    return Duel(first, common.in_turn(runs, rounds), distances, notes)
