"""Print and draw the report of a comparison."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from checkpoint import expect_writable, replace_file
from reference.compare import Report, Stage
from reference.names import advice

GREEN, RED, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"


def table(report: Report, colour: bool) -> str:
    """All stages, one line each: largest error, the same relative to the largest value and in floors of noise, and the
    type that has this noise."""
    width = max((len(stage.name) for stage in report.stages), default=4)
    lines = [f"{'stage':{width}}  {'max error':>10}  {'relative':>10}  {'x noise':>10}  {'type':8}"]
    for stage in report.stages:
        line = f"{stage.name:{width}}  {stage.error:10.3g}  {stage.relative:10.3g}  {in_floors(stage):>10}"
        line += f"  {stage.dtype:8}"
        if colour and stage.diverges:
            line = f"{RED}{line}{PLAIN}"
        elif colour:
            line = f"{GREEN}{line}{PLAIN}"
        if stage.how:
            line += f"  ({stage.how})"
        if stage.equal_after:
            line += f"  (equal after {stage.equal_after})"
        lines.append(line)
    return "\n".join(lines)


def in_floors(stage: Stage) -> str:
    """The error of a stage in floors of noise; empty if the noise is unknown."""
    if not stage.judged:
        return ""
    if stage.floor > 0:
        return f"{stage.error / stage.floor:.2f}"
    if stage.error == 0:
        return "0.00"
    return "inf"


def expect_plottable(path: Path) -> None:
    """Check, before the work, that `plot` can write a file.

    Raises:
        ValueError: matplotlib is missing, or does not know the format that the name ends with.
        FileNotFoundError, PermissionError: see `expect_writable`.
    """
    expect_writable(path)
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    formats = Figure().canvas.get_supported_filetypes()
    if image_format(path) not in formats:
        raise ValueError(f"--plot {path}: {path.suffix} is not supported; supported: {', '.join(sorted(formats))}")


def image_format(path: Path) -> str:
    """The format of an image, which its name ends with; "png" if there is no ending."""
    if path.suffix:
        return path.suffix.removeprefix(".").lower()
    return "png"


def plot(report: Report, path: Path) -> None:
    """Draw the error of every stage, and the floor of noise, through the depth of the model, after
    `expect_plottable`."""
    from matplotlib import pyplot

    stages = report.stages
    places = list(range(len(stages)))
    figure, axes = pyplot.subplots(figsize=(max(6, len(stages) / 8), 4), layout="constrained")
    axes.semilogy(places, above_zero([stage.error for stage in stages]), "o-", ms=3, label="error")
    floors = above_zero([stage.floor for stage in stages])
    axes.semilogy(places, floors, "--", label="noise of a right port")
    axes.set_xticks(places, [stage.name for stage in stages], rotation=90, fontsize=5)
    axes.set_ylabel("largest error against float64")
    axes.legend()
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=150, format=image_format(path)))
    pyplot.close(figure)


def above_zero(numbers: list[float]) -> list[float]:
    """The numbers with NaN for 0, which has no place on a logarithmic axis."""
    return [number if number else math.nan for number in numbers]


def show(report: Report) -> None:
    """Print the report: what diverges first, why, and all stages."""
    print(report.sentence)
    if report.verdict:
        print(report.verdict)
    for hint in report.hints:
        print(hint)
    for reason in report.misshapen:
        print(f"cannot be compared: {reason}")
    if report.unknown:
        cure = advice(report.unknown, [*report.missing, *(stage.name for stage in report.stages)])
        print(f"names that the reference does not have: {', '.join(report.unknown[:8])} ({cure})")
    if report.missing and report.stages:
        names = report.missing[:4]
        if len(report.missing) > len(names):
            names.append("...")
        print(f"not given: {len(report.missing)} stages, {', '.join(names)}")
    if report.stages:
        print()
        print(table(report, sys.stdout.isatty()))
