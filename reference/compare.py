"""Compare a stranger's trace with a reference: where it diverges first, in words, and which mistake that is.

A stage diverges when its largest error is more than MARGIN times the noise floor: the largest error that right ports
make there in the same type. `measure_noise` draws it from several runs of this implementation, each rounded in another
way, and measures it against float64 with the same weights and input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import half_split, interleave
from pretrained import PreTrainedModel
from reference.trace import LAYER, dimensions, order, record, rounded_differently

# The largest error of a right port, over the floor of these many more runs: measured in tests/test_explain.py.
SAMPLES, MARGIN = 8, 3.0
# The same over the error of a single run, where the model for more is missing.
MARGIN_OF_ONE_RUN = 12.0
LEAST = 1e-12  # relative error that float64 may have anywhere: what this implementation and the oracle differ by
WORDS = {"B": "text", "T": "key", "H": "head", "G": "key head", "V": "token", "P": "patch", "M": "merged patch"}


@dataclass
class Stage:
    """How one tensor compares.

    Attributes:
        name: of the point.
        error: largest absolute error, where it counts.
        relative: the same over the largest absolute value of the reference.
        floor: largest error of right ports in the port's type, NaN if unknown: then nothing is judged.
        where: index of the largest error, in the reference's dimensions.
        found, right: the numbers there.
        how: by which rearrangement the stranger's tensor was made to fit; empty if by none.
        diverges: whether the error is beyond the noise.
        equal_after: the rearrangement after which it would not diverge; empty if there is none.
        masked: whether a query does not see the key there.
    """

    name: str
    error: float
    relative: float
    floor: float
    where: tuple[int, ...]
    found: float
    right: float
    how: str
    diverges: bool
    equal_after: str = ""
    masked: bool = False

    def words(self) -> str:
        """The place of the largest error: "layer 3, head 5, query 12, key 4: holds 0.031, should be masked"."""
        layer, point = LAYER.search(self.name), self.name.rpartition(".")[2]
        token = "key" if point in ("k", "v", "k_rotated") else "query" if ".attention." in self.name else "position"
        places = [f"{'vision ' * self.name.startswith('vision.')}layer {layer[0]}"] if layer else []
        for dimension, index in zip(dimensions(self.name).split(), self.where):
            if dimension != "B" or index:
                word = token if dimension == "S" else WORDS.get(dimension, "number")
                places.append(f"{word} {index}")
        said = "should be masked" if self.masked else f"should be {self.right:.6g}"
        return f"{', '.join(places)}: holds {self.found:.6g}, {said}"


@dataclass
class Report:
    """What `compare` found.

    Attributes:
        stages: what was compared, in the order of computing.
        missing, unknown, misshapen: what could not be: not given, not in the reference, of another shape.
        first: the first stage that is wrong, if any; one that is right in another layout is not.
        agrees: whether something was compared, and all of it is right.
        sentence: the same in words.
        verdict, mutant: the known mistake that explains it, if one does.
        fitted: the stranger's tensors in the reference's shapes, and which of their entries count.
    """

    stages: list[Stage]
    missing: list[str]
    unknown: list[str]
    misshapen: list[str]
    first: str | None
    agrees: bool
    sentence: str
    verdict: str = ""
    mutant: str | None = None
    fitted: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        """All of it; numbers that JSON does not have are null."""
        content = asdict(replace(self, fitted={}))
        for entry in content["stages"]:
            for key, value in entry.items():
                if isinstance(value, float) and not math.isfinite(value):
                    entry[key] = None
        return json.dumps(content, indent=2, allow_nan=False)


# ------------------------------------------------------------------------------------------------------- shapes


def as_dumped(name: str, mine: Tensor, shape: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """What a tensor is without what dumps often have more: heads that repeat a mask or a key head, columns of a padded
    vocabulary, the numbers that are added to scores for a mask, True for hidden."""
    heads = dimensions(name).split().index("G") if " G " in dimensions(name) else None
    if name.endswith(".mask"):
        if mine.ndim == 4 and bool((mine == mine[:, :1]).all()):
            mine = mine[:, 0]
        added = mine.is_floating_point() and bool((mine < 0).any())
        mine = mine == 0 if added else mine != 0
        yield "as added to scores" if added else "", mine
        yield "True is hidden", ~mine
    elif name == "logits" and mine.shape[-1:] > tuple(shape[-1:]):
        yield f"the first {shape[-1]} columns", mine[..., : shape[-1]]
    elif heads is not None and mine.ndim == len(shape) and mine.shape[heads] > shape[heads] and (
            mine.shape[heads] % shape[heads] == 0):  # fmt: skip
        groups = mine.reshape(*mine.shape[:heads], shape[heads], -1, *mine.shape[heads + 1 :])
        once = groups.narrow(heads + 1, 0, 1)
        if bool((groups == once).all()):
            yield "one of each repeated head", once.squeeze(heads + 1)
    else:
        yield "", mine


def rearranged(mine: Tensor, shape: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The ways in which a tensor can be brought to a shape: as it is, without or with a dimension of one, with its
    dimensions in another order, heads joined or split."""
    shape = tuple(shape)
    if tuple(mine.shape) == shape:
        yield "", mine
    squeezed = mine.squeeze()
    wanted = [n for n in shape if n != 1]
    for axes in permutations(range(squeezed.ndim)) if squeezed.ndim == len(wanted) <= 4 else ():
        if [squeezed.shape[axis] for axis in axes] == wanted and not (tuple(mine.shape) == shape and axes == tuple(
                range(len(axes)))):  # fmt: skip
            said = f"transposed {list(axes)}" if list(axes) != sorted(axes) else "without dimensions of one"
            yield said, squeezed.permute(axes).reshape(shape)
    if len(shape) >= 3 and squeezed.ndim == len(wanted) - 1:  # (B, S, H * D) for (B, H, S, D)
        *batch, H, S, D = shape
        if squeezed.numel() == math.prod(shape) and tuple(squeezed.shape[-2:]) == (S, H * D):
            yield "heads split", squeezed.reshape(*batch, S, H, D).transpose(-3, -2)
    if mine.numel() == math.prod(shape) and mine.ndim != len(shape) and mine.shape[-1:] != shape[-1:]:
        yield "last dimensions joined", mine.reshape(shape)  # (B, S, H, D) for (B, S, H * D)
    if mine.ndim == len(shape) - 1 and mine.ndim > 1 and mine.shape == (shape[0] * shape[1], *shape[2:]):
        yield "texts split", mine.reshape(shape)  # (B * S, E) for (B, S, E), (B * H, S, D) for (B, H, S, D)
    if len(shape) >= 2 and squeezed.ndim == len(wanted) + 1 and squeezed.numel() == math.prod(shape):
        yield "heads joined", squeezed.transpose(-3, -2).reshape(shape)  # (B, H, S, D) for (B, S, H * D)


def fits(name: str, mine: Tensor, shape: Sequence[int], real: Tensor | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """All ways to bring a stranger's tensor to the reference's shape: how, the tensor, and which entries are given."""
    everything = torch.ones(tuple(shape), dtype=torch.bool)
    for dumped, tensor in as_dumped(name, mine, shape):
        for how, fit in rearranged(tensor, shape):
            yield ", ".join(filter(None, (dumped, how))), fit, everything
        if name == "logits" and shape[1] > 1 and tensor.shape in ((shape[0], shape[2]), (shape[0], 1, shape[2])):
            last = torch.full((shape[0],), shape[1] - 1)
            if real is not None:
                last = torch.where(real, torch.arange(shape[1]), 0).amax(1)
            rows, full = torch.arange(shape[0]), torch.zeros(tuple(shape), dtype=tensor.dtype)
            full[rows, last] = tensor.reshape(shape[0], shape[2])
            given = torch.zeros_like(everything)
            given[rows, last] = True
            yield ", ".join(filter(None, (dumped, "of the last token"))), full, given


def relaid(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other layouts that queries and keys may be in: rotary pairs as neighbours, or as halves."""
    if name.endswith((".q", ".k", "_rotated", ".q_scaled")):
        for said, reorder in (("half-split -> interleaved", interleave), ("interleaved -> half-split", half_split)):
            rows = tensor.transpose(-1, -2)  # (..., D, S): the rows of one head
            order_of = reorder(torch.arange(rows.shape[-2])[:, None], 1)[:, 0]
            yield said, rows[..., order_of, :].transpose(-1, -2)


# -------------------------------------------------------------------------------------------------------- types


def narrowest(tensor: Tensor) -> torch.dtype:
    """The narrowest of bfloat16, float16, float32 and float64 that holds all numbers of a tensor but those that mark
    what is hidden or padding: NaN, infinities, lowest numbers."""
    values = torch.where(tensor.double().abs() < 1e30, tensor.double(), 0.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if values.to(dtype).double().equal(values):
            return dtype
    return torch.float64


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one of two types that has fewer digits."""
    return a if torch.finfo(a).eps >= torch.finfo(b).eps else b


def least(dtype: torch.dtype) -> float:
    """The relative error that a right port may have anywhere, however exact this implementation happens to be there."""
    return LEAST if dtype == torch.float64 else torch.finfo(dtype).eps


def computed_in(mine: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The type that the error of each stage comes from: the coarsest of those that it and the stages before it were
    computed in, because what is computed in float32 from bfloat16 is no better than that. What was computed in bfloat16
    may be stored as float32, which .npz files make one do; but numbers that are exact in it, as embeddings, prove
    nothing."""
    found, coarsest = dict[str, torch.dtype](), torch.float64
    for name in order(mine.keys() & reference.keys()):
        if mine[name].is_floating_point() and not name.endswith(".mask"):
            stored, held, exact = mine[name].dtype, narrowest(mine[name]), narrowest(reference[name])
            shown = stored if coarser(exact, held) == exact else held
            found[name] = coarsest = coarser(coarsest, shown)
    return found


def measure_noise(
    model: PreTrainedModel, reference: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """What right ports may compute in a model's type: of several runs, the number furthest from the reference.

    One run is not enough. Where one number decides the error of all that follows, such as a residual that nearly
    cancels and that a norm enlarges, that error is a single draw, and it may happen to be close to zero.

    Args:
        model: in the port's type.
        reference: the stages to measure, in float64.
        inputs: what `record` takes, in the model's type.
    """

    def keep(name: str) -> bool:
        return name in reference and not name.endswith(".mask")

    furthest = record(model, keep=keep, **inputs)
    for seed in range(SAMPLES):
        with rounded_differently(model, seed):
            sample = record(model, keep=keep, **inputs)
        for name, tensor in sample.items():
            right, other = reference[name].double(), furthest[name]
            further = (tensor.double() - right).abs() > (other.double() - right).abs()
            furthest[name] = torch.where(further, tensor, other)
    return furthest


# ---------------------------------------------------------------------------------------------------- comparing


def counts(name: str, shape: Sequence[int], masks: Mapping[str, Tensor], real: Tensor | None) -> Tensor:
    """Which entries are compared: not those of padding, and no scores of hidden keys. bool of that shape."""
    keep = torch.ones(tuple(shape), dtype=torch.bool)
    dims = dimensions(name).split()
    if real is not None and "B" in dims:
        view = [real.shape[0] if d == "B" else real.shape[1] if d == "S" else 1 for d in dims]
        keep &= real.view(view)
    if name.endswith(".scores") and (mask := masks.get(name.replace("scores", "mask"))) is not None:
        keep &= mask[:, None]
    return keep


@dataclass
class Truth:
    """What a stage is compared with: the reference, its noise (in the port's type) or how much it is, relative to
    the largest number, what counts, and how many floors of noise an error may be."""

    name: str
    right: Tensor
    noise: Tensor | None
    relative: float
    keep: Tensor
    margin: float

    def floor(self, keep: Tensor) -> float:
        """The largest error that a right port of the type makes; NaN if unknown."""
        if self.name.endswith(".mask"):
            return 0.0
        size = float(torch.where(keep, self.right.double().abs(), 0.0).max())
        if self.noise is None:
            return self.relative * size
        noise = torch.where(keep, (self.noise.double() - self.right.double()).abs(), 0.0)
        return max(float(noise.max()), least(self.noise.dtype) * size)

    def stage(self, mine: Tensor, given: Tensor, how: str) -> Stage:
        """Compare one tensor that fits."""
        a, b, keep = mine.double(), self.right.double(), self.keep & given
        error = torch.where(keep, (a - b).abs(), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        size = float(torch.where(keep, b.abs(), 0.0).max())
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), b.shape))
        largest, floor = float(error.max()), self.floor(keep)
        diverges = largest > self.margin * floor or math.isinf(largest)
        relative = largest / size if size else largest
        return Stage(self.name, largest, relative, floor, where, float(a[where]), float(b[where]), how, diverges)


def leak(best: Stage, mine: Tensor, keep: Tensor, mask: Tensor) -> None:
    """Make probabilities of hidden keys, however small, the stage's error."""
    leaked = torch.where(keep & ~mask[:, None], mine.double().abs(), 0.0)
    if float(leaked.max()) > 1e-6:
        best.where = tuple(int(i) for i in torch.unravel_index(leaked.argmax(), leaked.shape))
        best.found, best.right, best.diverges = float(leaked.max()), 0.0, True
    best.masked = not mask[best.where[0], best.where[2], best.where[3]]


def compare(
    mine: Mapping[str, Tensor], reference: Mapping[str, Tensor], noise: Mapping[str, Tensor],
    real: Tensor | None = None, relative: Mapping[str, float] | None = None, margin: float = MARGIN,
) -> Report:  # fmt: skip
    """Compare traces stage by stage, in the order of computing.

    Args:
        mine: the stranger's tensors, under the names of `reference.trace.POINTS`.
        reference: the same in float64.
        noise: what `measure_noise` returns for the type of `computed_in`; may be empty.
        real: bool (B, S), False at padding, which is not compared.
        relative: where there is no noise, a right port's largest error over the largest number.
        margin: how many floors of noise an error may be.
    """
    masks = {name: tensor.bool() for name, tensor in reference.items() if name.endswith(".mask")}
    stages, misshapen, fitted = [], [], dict[str, tuple[Tensor, Tensor]]()
    for name in order(reference.keys() & mine.keys()):
        right = reference[name]
        found = list(fits(name, mine[name], right.shape, real))
        if not found:
            misshapen.append(f"{name} is {list(mine[name].shape)}, the reference {list(right.shape)}")
            continue
        keep = counts(name, right.shape, masks, real)
        truth = Truth(name, right, noise.get(name), (relative or {}).get(name, math.nan), keep, margin)
        tried = [truth.stage(tensor, given, how) for how, tensor, given in found]
        apart = [(stage.error, int((fit != right).sum())) for stage, (_, fit, _) in zip(tried, found)]
        place = apart.index(min(apart)) if tried[0].diverges else 0
        best, (how, tensor, given) = tried[place], found[place]
        fitted[name] = tensor, keep & given
        for said, other in relaid(name, tensor) if best.diverges else ():
            if not truth.stage(other, given, how).diverges:
                best.equal_after = said
        if name.endswith(".probabilities") and (mask := masks.get(name.replace("probabilities", "mask"))) is not None:
            leak(best, tensor, keep, mask)
        stages.append(best)
    missing = [name for name in order(reference) if name not in mine and not name.startswith("input.")]
    unknown = sorted(name for name in mine if name not in reference and not name.startswith("input."))
    wrong = next((s for s in stages if s.diverges and not s.equal_after), None)
    judged = any(not math.isnan(s.floor) for s in stages)
    agrees = judged and wrong is None and not misshapen
    sentence = summary(stages, misshapen, wrong)
    first = None if wrong is None else wrong.name
    return Report(stages, missing, unknown, misshapen, first, agrees, sentence, fitted=fitted)


def summary(stages: Sequence[Stage], misshapen: Sequence[str], wrong: Stage | None) -> str:
    """What was found, in a sentence or two."""
    if not stages:
        lacking = "the shape that it has in" if misshapen else "a name of"
        return f"nothing to compare: no tensor has {lacking} the reference"
    said = ""
    if len(misshapen) > len(stages):
        said = f"{len(misshapen)} of {len(misshapen) + len(stages)} stages cannot be compared: {misshapen[0]}. "
    if wrong is not None:
        return f"{said}{wrong.name} diverges first. {wrong.words()}"
    judged = [s for s in stages if not math.isnan(s.floor)]
    if judged:
        said += f"{len(judged)} stage{'s agree' if len(judged) != 1 else ' agrees'}"
    if layouts := sorted({s.equal_after for s in stages if s.equal_after}):
        said += f", {sum(bool(s.equal_after) for s in stages)} of them after {' or '.join(layouts)}"
    if unjudged := len(stages) - len(judged):
        said += f"{', ' * bool(judged)}{unjudged} cannot be judged: the noise of their type is not known"
    return said


# ------------------------------------------------------------------------------------------------------- output


def table(report: Report, colour: bool) -> str:
    """All stages, one line each: largest error, the same relative to the largest value, and in floors of noise."""
    marks = {"ok": "\x1b[32m", "bad": "\x1b[31m", "end": "\x1b[0m"} if colour else {"ok": "", "bad": "", "end": ""}
    width = max((len(s.name) for s in report.stages), default=4)
    lines = [f"{'stage':{width}}  {'max error':>10}  {'relative':>10}  {'x noise':>10}"]
    for s in report.stages:
        ratio = s.error / s.floor if s.floor > 0 else (0.0 if s.error == 0 else math.inf)
        times = f"{ratio:10.2f}" if not math.isnan(s.floor) else " " * 10
        mark = marks["bad" if s.diverges else "ok"]
        note = "".join(f"  ({said})" for said in (s.how, s.equal_after and f"equal after {s.equal_after}") if said)
        lines.append(f"{mark}{s.name:{width}}  {s.error:10.3g}  {s.relative:10.3g}  {times}{marks['end']}{note}")
    return "\n".join(lines)


def plot(report: Report, path: Path) -> None:
    """Draw the error of every stage, and the floor of noise, through the depth of the model (needs matplotlib).

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6, len(report.stages) / 8), 4), layout="constrained")
    places = range(len(report.stages))
    axes.semilogy(places, [s.error or math.nan for s in report.stages], "o-", ms=3, label="error")
    axes.semilogy(places, [s.floor or math.nan for s in report.stages], "--", label="noise of a right port")
    axes.set_xticks(list(places), [s.name for s in report.stages], rotation=90, fontsize=5)
    axes.set_ylabel("largest error against float64")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
