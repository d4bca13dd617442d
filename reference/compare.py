"""Compare a stranger's trace with a reference: where it diverges first, in words, and which mistake that is.

A stage diverges when its largest error is more than MARGIN times the largest error that this implementation itself
makes there in the stranger's type: the noise floor, measured against float64 with the same weights and input.
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
from ministral import PreTrainedModel
from reference.mutants import MUTANTS, ROUNDING
from reference.trace import LAYER, dimensions, order, record

# Two right implementations of one type differ from float64 by errors whose maxima are within this factor of each other:
# measured in tests/test_reference.py.
MARGIN = 4.0
LEAST = 1e-12  # relative error that float64 may have anywhere: what this implementation and the oracle differ by
ENOUGH = 16  # numbers in which a mistake must show, so that equal bits are no accident of rounding
WORDS = {"B": "text", "S": "query", "T": "key", "H": "head", "G": "key head", "E": "number", "D": "number",
         "F": "number", "V": "token", "P": "patch", "C": "number", "M": "merged patch", "HD": "number"}  # fmt: skip


@dataclass
class Stage:
    """How one tensor compares.

    Attributes:
        name: of the point.
        error: largest absolute error, where it counts.
        relative: the same over the largest absolute value of the reference.
        floor: largest error of this implementation in the stranger's type, NaN if unknown.
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
        layer = LAYER.search(self.name)
        places = [f"layer {layer[0]}"] if layer else []
        places += [f"{WORDS.get(d, d)} {i}" for d, i in zip(dimensions(self.name).split(), self.where) if d != "B" or i]
        said = "should be masked" if self.masked else f"should be {self.right:.6g}"
        return f"{', '.join(places)}: holds {self.found:.6g}, {said}"


@dataclass
class Report:
    """What `compare` found: the stages in order, what could not be compared, and the mistake that explains it."""

    stages: list[Stage]
    missing: list[str]
    unknown: list[str]
    misshapen: list[str]
    first: str | None
    sentence: str
    verdict: str = ""
    mutant: str | None = None
    fitted: dict[str, Tensor] = field(default_factory=dict, repr=False)  # the stranger's tensors in the right shapes

    def to_json(self) -> str:
        """All of it; numbers that JSON does not have are null."""
        content = asdict(replace(self, fitted={}))
        for entry in content["stages"]:
            for key, value in entry.items():
                if isinstance(value, float) and not math.isfinite(value):
                    entry[key] = None
        return json.dumps(content, indent=2, allow_nan=False)


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
    if mine.numel() == math.prod(shape) and mine.ndim == 2 and len(shape) == 3 and mine.shape[-1] == shape[-1]:
        yield "texts split", mine.reshape(shape)  # (B * S, E) for (B, S, E)
    if len(shape) >= 2 and squeezed.ndim == len(wanted) + 1 and squeezed.numel() == math.prod(shape):
        yield "heads joined", squeezed.transpose(-3, -2).reshape(shape)  # (B, H, S, D) for (B, S, H * D)


def relaid(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other layouts that queries and keys may be in: rotary pairs as neighbours, or as halves."""
    if name.endswith((".q", ".k", "_rotated", ".q_scaled")):
        for said, reorder in (("half-split -> interleaved", interleave), ("interleaved -> half-split", half_split)):
            rows = tensor.transpose(-1, -2)  # (..., D, S): the rows of one head
            order_of = reorder(torch.arange(rows.shape[-2])[:, None], 1)[:, 0]
            yield said, rows[..., order_of, :].transpose(-1, -2)


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


def stage(name: str, mine: Tensor, right: Tensor, keep: Tensor, noise: Tensor | None, how: str) -> Stage:
    """Compare one tensor that fits."""
    a, b = mine.double(), right.double()
    error = torch.where(keep, (a - b).abs(), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    size = float(torch.where(keep, b.abs(), 0.0).max())
    worst = int(error.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), b.shape))
    floor = math.nan
    if noise is not None and mine.is_floating_point():
        least = (LEAST if mine.dtype == torch.float64 else torch.finfo(mine.dtype).eps) * size
        floor = max(float(torch.where(keep, (noise.double() - b).abs(), 0.0).max()), least)
    largest = float(error.max())
    diverges = largest > (1e-2 * size if math.isnan(floor) else MARGIN * floor)
    found, wanted = float(a[where]), float(b[where])
    return Stage(name, largest, largest / size if size else largest, floor, where, found, wanted, how, diverges)


def compare(
    mine: Mapping[str, Tensor], reference: Mapping[str, Tensor], noise: Mapping[str, Tensor], real: Tensor | None = None
) -> Report:
    """Compare traces stage by stage, in the order of computing.

    Args:
        mine: the stranger's tensors, under the names of `reference.trace.POINTS`.
        reference: the same in float64.
        noise: this implementation's in the stranger's type; may be empty.
        real: bool (B, S), False at padding, which is not compared.
    """
    masks = {name: tensor.bool() for name, tensor in reference.items() if name.endswith(".mask")}
    stages, misshapen, fitted = [], [], dict[str, Tensor]()
    for name in order(reference.keys() & mine.keys()):
        right = reference[name]
        keep = counts(name, right.shape, masks, real)
        fits = list(rearranged(mine[name], right.shape))
        if not fits:
            misshapen.append(f"{name} is {list(mine[name].shape)}, the reference {list(right.shape)}")
            continue
        found = [stage(name, tensor, right, keep, noise.get(name), how) for how, tensor in fits]
        place = 0 if not found[0].diverges else min(range(len(found)), key=lambda i: found[i].error)
        best, fitted[name] = found[place], fits[place][1]
        for said, other in relaid(name, fitted[name]) if best.diverges else ():
            if not stage(name, other, right, keep, noise.get(name), best.how).diverges:
                best.equal_after = said
        mask = masks.get(name.rpartition(".")[0] + ".mask")
        if name.endswith(".probabilities") and mask is not None:
            leaked = torch.where(keep & ~mask[:, None], fitted[name].double().abs(), 0.0)
            if float(leaked.max()) > 1e-6:  # a hidden key that is seen, however little
                best.where = tuple(int(i) for i in torch.unravel_index(leaked.argmax(), leaked.shape))
                best.found, best.right, best.diverges = float(leaked.max()), 0.0, True
            best.masked = not mask[best.where[0], best.where[2], best.where[3]]
        stages.append(best)
    first = next((s for s in stages if s.diverges and not s.equal_after), None)
    first = first or next((s for s in stages if s.diverges), None)
    sentence = f"{len(stages)} stages agree" if stages else "nothing to compare: no tensor has a name of the reference"
    if misshapen and not stages:
        sentence = "nothing to compare: no tensor has the shape that it has in the reference"
    if first is not None:
        sentence = f"{first.name} diverges first. {first.words()}"
        sentence += f". Equal after {first.equal_after}" if first.equal_after else ""
    named = [name for name in order(reference) if name not in mine and not name.startswith("input.")]
    unknown = sorted(name for name in mine if name not in reference and not name.startswith("input."))
    first_name = None if first is None else first.name
    return Report(stages, named, unknown, misshapen, first_name, sentence, fitted=fitted)


# ------------------------------------------------------------------------------------------------------ mutants


def differences(a: Tensor, b: Tensor) -> int:
    """In how many numbers two tensors differ, rows that occur several times counted once."""
    rows = torch.unique(torch.cat((a.flatten(0, -2), b.flatten(0, -2)), dim=-1).double(), dim=0)
    return int((rows[:, : a.shape[-1]] != rows[:, a.shape[-1] :]).sum())


def explain(
    mine: Tensor, model: PreTrainedModel, exact: PreTrainedModel, inputs: Mapping[str, Any], name: str = "logits"
) -> tuple[str | None, str]:
    """Which known mistake reproduces a stranger's tensor, if any, and a sentence about it. A right port is not accused:
    a mistake is named when it gives the stranger's very bits, the right model does not, and it matters in exact
    arithmetic (or is one of rounding); or when the difference to float64 is, but for noise, the one that the mistake
    makes there.

    Args:
        mine: the stranger's tensor of that name.
        model: the model in the stranger's type.
        exact: the same in float64.
        inputs: what `record` takes.
    """

    def run(which: PreTrainedModel) -> Tensor | None:
        try:
            found = record(which, keep=name.__eq__, **inputs).get(name)
        except ValueError:  # the mistake makes this input impossible: a text of one token without its first
            return None
        return found

    right, truth = run(model), run(exact)
    if right is None or truth is None:
        return None, f"the reference has no {name}"
    real = inputs.get("attention_mask")
    keep = counts(name, truth.shape, {}, None if real is None else real.bool())

    def vector(tensor: Tensor) -> Tensor:
        kept = keep[:, -tensor.shape[1] :] if name == "logits" else keep
        return tensor.double()[kept.expand_as(tensor)]

    if mine.shape == right.shape and vector(mine).equal(vector(right)):
        return None, f"your {name} are this implementation's, bit for bit"
    shorter = name == "logits" and mine.ndim == truth.ndim and mine.shape[1] < truth.shape[1]  # without <s>
    near, base = (tensor[:, -mine.shape[1] :] if shorter else tensor for tensor in (right, truth))
    if mine.shape != base.shape:
        return None, f"no known mistake reproduces your {name}"
    noise, away = (vector(tensor) - vector(base) for tensor in (near, mine))
    same, candidates = [], []
    for mutant in MUTANTS.values():
        with mutant.applied():
            found, moved = run(model), run(exact)
        if found is None or moved is None or found.shape != mine.shape:
            continue
        shift = vector(moved) - vector(base)
        size = float(shift.norm())
        changed = math.inf if found.shape != right.shape else differences(found, right)
        matters = size > 1e-9 * float(vector(base).norm())
        rounds = mutant.name in ROUNDING and mine.dtype in (torch.bfloat16, torch.float16)
        if (matters or rounds) and changed >= ENOUGH and vector(found).equal(vector(mine)):
            same.append(mutant.name)
        share = float(away @ shift) / size**2 if size else 0.0  # 1 for this mistake, about 0 for a right port
        if matters and 0.7 < share < 1.3 and (size > float(noise.norm()) or share * size > 0.9 * float(away.norm())):
            cosine = float(torch.cosine_similarity(vector(moved), vector(mine), 0))
            candidates.append((float((away - shift).norm()), mutant.name, cosine))
    if not same and not candidates:
        return None, f"no known mistake reproduces your {name}"
    _, named, cosine = min(candidates) if not same else (0, same[0], 1.0)
    how = "bit for bit" if same else f"cosine {cosine:.6f}"
    others = f" (and {', '.join(same[1:])}, which does the same here)" if same[1:] else ""
    said = f"your {name} match mutant {named!r}, {how}{others}: {MUTANTS[named].mistake}"
    return named, f"{said} (see docs/numerics.md)"


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
