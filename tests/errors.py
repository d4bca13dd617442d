"""A statistical test: is the rounding error of one implementation larger than that of another?

A case is one random model with one input. Both sides compute it, and float64 gives the exact result. The two errors of
a case differ by chance, by a factor of 2 now and then. One case proves nothing, and a median beside a median proves
little. The logarithm of the ratio of the two errors has mean 0 when both sides are equally exact. So its mean over many
cases is tested, with the standard error that these cases have. A bound on the worst case is added.

Both sides have the same weights. Most of their noise is then common and cancels, which makes the comparison sharp: with
250 cases, the standard error is below 0.01 in float32. Cases with equal bits count with a ratio of 1.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

import hypothesis
from torch import Tensor

# A right implementation fails once in 30,000 runs: its mean lies this many standard errors above 0.
SIGMAS = 4.0
# A mean ratio that is not distinguished from 1. Two right kernels differ by 0.2 % here.
MEAN_RATIO = 1.01
# The largest ratio of one case. Right implementations reached 4.4 in 6,000 cases. One wrong key gives thousands.
LARGEST_RATIO = 12.0


def number_of_cases(full: int) -> int:
    """`full` with `pytest --all`, which has 30 examples or more, or a third of it."""
    return full if hypothesis.settings().max_examples >= 30 else full // 3


@dataclass
class Errors:
    """Errors of two sides against float64, over many cases.

    Attributes:
        mean: for each case, the logarithm of the ratio of the root mean square errors, ours over theirs.
        largest: the same of the largest errors.
    """

    mean: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        """Add one case: what both sides computed, and the result in float64."""
        our_error, their_error = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
        if ours.equal(theirs):
            self.mean.append(0.0)
            self.largest.append(0.0)
            return
        self.mean.append(0.5 * math.log(our_error.pow(2).mean() / their_error.pow(2).mean()))
        self.largest.append(math.log(our_error.max() / their_error.max()))

    @property
    def differ(self) -> int:
        """The number of cases in which the bits of the two sides differ."""
        return sum(value != 0.0 for value in self.mean)

    @property
    def ratio(self) -> float:
        """The geometric mean of the ratios."""
        return math.exp(statistics.mean(self.mean))

    @property
    def standard_error(self) -> float:
        """The standard error of the mean logarithm."""
        return statistics.stdev(self.mean) / math.sqrt(len(self.mean))

    @property
    def room(self) -> float:
        """The distance of the mean logarithm below its bound. Negative: our error is larger."""
        return math.log(MEAN_RATIO) + SIGMAS * self.standard_error - statistics.mean(self.mean)

    @property
    def no_larger(self) -> bool:
        """Whether our error is not significantly larger."""
        return self.room >= 0 and max(self.largest) <= math.log(LARGEST_RATIO)

    @property
    def smaller(self) -> bool:
        """Whether our error is significantly smaller."""
        return statistics.mean(self.mean) + SIGMAS * self.standard_error < 0

    def __str__(self) -> str:
        return (
            f"{self.differ} of {len(self.mean)} cases differ; our error over theirs: mean ratio {self.ratio:.4f}"
            f" (bound {self.ratio * math.exp(self.room):.4f}), standard error {self.standard_error:.4f},"
            f" single cases {math.exp(min(self.largest)):.2f} to {math.exp(max(self.largest)):.2f}"
        )
