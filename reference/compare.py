"""Compare a port's trace with a reference: where it diverges first, in words, and which mistake that is.

A stage diverges when its largest error is more than MARGIN times the noise floor: the largest error that right ports
make there in the same type. `measure_noise` draws it from several runs of this implementation, each rounded in another
way, and measures it against float64 with the same weights and input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pretrained import PreTrainedModel
from reference.layouts import REVERSED, fits, hidden_keys, in_other_layouts, joined
from reference.trace import LAYER, dimensions, order, record, rounded_differently

# The largest error of a right port, over the floor of these many more runs: measured in tests/test_explain.py.
SAMPLES, MARGIN = 8, 3.0
# The same over the error of a single run, where the model for more is missing.
MARGIN_OF_ONE_RUN = 12.0
# The relative error that float64 may have anywhere: this implementation and the oracle differ by that.
LEAST = 1e-12
# The largest probability that a right port may give to a hidden key.
LEAK = 1e-6
WORDS = {
    "B": "text", "T": "key", "H": "head", "G": "key head",
    "V": "token", "P": "patch", "M": "merged patch",
}  # fmt: skip

Trace = Mapping[str, Tensor]


@dataclass
class Stage:
    """The comparison of one tensor.

    Attributes:
        name: of the point.
        error: largest absolute error, where it counts.
        relative: the same over the largest absolute value of the reference.
        floor: largest error of right ports in the port's type, NaN if unknown: then nothing is judged.
        where: index of the largest error, in the reference's dimensions.
        value, expected: the port's number there, and the reference's.
        dtype: the type whose noise is allowed; empty if unknown.
        how: by which rearrangement the port's tensor was made to fit; empty if by none.
        diverges: whether the error is beyond the noise.
        equal_after: the rearrangement after which it would not diverge; empty if there is none.
        masked: whether a query does not see the key there.
    """

    name: str
    error: float
    relative: float
    floor: float
    where: tuple[int, ...]
    value: float
    expected: float
    dtype: str
    how: str
    diverges: bool
    equal_after: str = ""
    masked: bool = False

    @property
    def judged(self) -> bool:
        """True if the noise of a right port is known."""
        return not math.isnan(self.floor)

    def words(self) -> str:
        """The place of the largest error: "layer 3, head 5, query 12, key 4: holds 0.031, should be masked"."""
        point = self.name.rpartition(".")[2]
        token = "position"
        if point in ("k", "v", "k_rotated"):
            token = "key"
        elif ".attention." in self.name:
            token = "query"

        places = []
        layer = LAYER.search(self.name)
        if layer and self.name.startswith("vision."):
            places.append(f"vision layer {layer[0]}")
        elif layer:
            places.append(f"layer {layer[0]}")
        for dimension, index in zip(dimensions(self.name).split(), self.where):
            if dimension == "B" and index == 0:
                continue
            word = WORDS.get(dimension, "number")
            if dimension == "S":
                word = token
            places.append(f"{word} {index}")

        expected = f"should be {self.expected:.6g}"
        if self.masked:
            expected = "should be masked"
        return f"{', '.join(places)}: holds {self.value:.6g}, {expected}"


@dataclass
class Report:
    """The result of `compare`.

    Attributes:
        stages: what was compared, in the order of computing.
        missing, unknown, misshapen: what could not be: not given, not in the reference, of another shape.
        first: the first stage that is wrong, if any; one that is right in another layout is not.
        agrees: whether something was compared, and all of it is right.
        sentence: the same in words.
        verdict, mutant: the known mistake that explains it, if one does.
        parts: the known mistakes that explain a part of it, or all of it together.
        hints: what is suspicious about the inputs, in sentences.
        fitted: the port's tensors in the reference's shapes, and which of their entries count.
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
    parts: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    fitted: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        """The report as JSON; numbers that JSON does not have are null."""
        content = asdict(replace(self, fitted={}))
        for entry in content["stages"]:
            for key, value in entry.items():
                if isinstance(value, float) and not math.isfinite(value):
                    entry[key] = None
        return json.dumps(content, indent=2, allow_nan=False)


# -------------------------------------------------------------------------------------------------------- types


def narrowest(tensor: Tensor) -> torch.dtype:
    """The narrowest of bfloat16, float16, float32 and float64 that holds all numbers of a tensor.

    Numbers that mark what is hidden or padding do not count: NaN, infinities, lowest numbers.
    """
    values = tensor.double()
    values = torch.where(values.abs() < 1e30, values, 0.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if values.to(dtype).double().equal(values):
            return dtype
    return torch.float64


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one of two types that has fewer digits."""
    if torch.finfo(a).eps >= torch.finfo(b).eps:
        return a
    return b


def least(dtype: torch.dtype) -> float:
    """The relative error that a right port may have anywhere, however exact this implementation happens to be."""
    if dtype in (torch.float64, torch.bool):
        return LEAST
    return torch.finfo(dtype).eps


def computed_in(port: Trace, reference: Trace) -> dict[str, torch.dtype]:
    """The type that the error of each stage comes from.

    It is the coarsest of the types that the stage and those before it were computed in, because what is computed in
    float32 from bfloat16 is no better than that. What was computed in bfloat16 may be stored as float32, which .npz
    files make one do. But numbers that are exact in bfloat16, as embeddings are, prove nothing.
    """
    types: dict[str, torch.dtype] = {}
    coarsest = torch.float64
    for name in order(port.keys() & reference.keys()):
        tensor = port[name]
        if not tensor.is_floating_point() or name.endswith(".mask"):
            continue
        shown = narrowest(tensor)
        exact = narrowest(reference[name])
        if coarser(exact, shown) == exact:
            shown = tensor.dtype
        coarsest = coarser(coarsest, shown)
        types[name] = coarsest
    return types


def measure_noise(model: PreTrainedModel, reference: Trace, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Right results in a model's type: of several runs, the number furthest from the reference.

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
            exact = reference[name].double()
            other = furthest[name]
            further = (tensor.double() - exact).abs() > (other.double() - exact).abs()
            furthest[name] = torch.where(further, tensor, other)
    return furthest


# ---------------------------------------------------------------------------------------------------- comparing


def counts(name: str, shape: Sequence[int], masks: Trace, padding_mask: Tensor | None) -> Tensor:
    """bool of that shape: which entries are compared. Those of padding are not, nor scores of hidden keys."""
    counted = torch.ones(tuple(shape), dtype=torch.bool)
    dims = dimensions(name).split()
    if padding_mask is not None and "B" in dims:
        B, S = padding_mask.shape
        sizes = {"B": B, "S": S}
        counted &= padding_mask.view([sizes.get(dim, 1) for dim in dims])
    mask = masks.get(name.replace("scores", "mask"))
    if name.endswith(".scores") and mask is not None:
        counted &= mask[:, None]
    return counted


@dataclass
class Target:
    """The reference that a stage is compared with.

    Attributes:
        name: of the point.
        reference: the right tensor.
        noise: a right port's tensor, in the port's type, if one is known.
        relative: if none is: a right port's largest error over the largest number, NaN if unknown, too.
        counted: which entries are compared.
        margin: how many floors of noise an error may be.
        dtype: the port's type, in words.
        head_dim: D, 0 if unknown.
        mask: of scores: bool (B, S, T), False for hidden keys, if it is known.
    """

    name: str
    reference: Tensor
    noise: Tensor | None
    relative: float
    counted: Tensor
    margin: float
    dtype: str
    head_dim: int
    mask: Tensor | None

    def size(self, counted: Tensor) -> float:
        """The largest absolute value of the reference."""
        return float(torch.where(counted, self.reference.double().abs(), 0.0).max())

    def floor(self, counted: Tensor) -> float:
        """The largest error that a right port of the type makes; NaN if unknown."""
        if self.name.endswith(".mask"):
            return 0.0
        exact = self.reference.double()
        size = self.size(counted)
        if self.noise is None:
            return self.relative * size
        noise = torch.where(counted, (self.noise.double() - exact).abs(), 0.0)
        return max(float(noise.max()), least(self.noise.dtype) * size)

    def stage(self, tensor: Tensor, given: Tensor, how: str) -> Stage:
        """The comparison with one tensor that fits."""
        tensor, exact = tensor.double(), self.reference.double()
        counted = self.counted & given
        error = torch.where(counted, (tensor - exact).abs(), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), exact.shape))
        largest = float(error.max())
        size = self.size(counted)
        relative = largest
        if size:
            relative = largest / size
        floor = self.floor(counted)
        diverges = largest > self.margin * floor or math.isinf(largest)
        value = float(tensor[where])
        expected = float(exact[where])
        return Stage(
            self.name, largest, relative, floor, where, value, expected, self.dtype, how, diverges
        )  # fmt: skip

    def fit(self, how: str, tensor: Tensor, given: Tensor) -> Fit:
        """The comparison with one tensor that fits. Scores are not compared where the port hides the key; which keys
        these are is compared as the mask."""
        hidden = None
        if self.mask is not None:
            hidden = hidden_keys(tensor, self.counted, self.size(self.counted))
        if hidden is None or self.mask is None:
            stage = self.stage(tensor, given, how)
            return Fit(stage, tensor, given, self.counted & given)
        seen = given & ~hidden[:, None]
        stage = self.stage(tensor, seen, how)
        queries = self.counted.any(1).any(-1)[..., None]
        lacking = int((hidden & self.mask & queries).sum())
        additional = int((~hidden & ~self.mask & queries).sum())
        return Fit(stage, tensor, given, self.counted & seen, ~hidden, lacking, additional)


@dataclass
class Fit:
    """One way to read a port's tensor in the reference's shape.

    Attributes:
        stage: the comparison.
        tensor: in the reference's shape.
        given: which of its entries the port gives.
        counted: which of them are compared.
        visible: bool (B, S, T), the mask that scores show; None: none.
        lacking, additional: the numbers of keys that are visible in the reference's mask only, and in this one only.
    """

    stage: Stage
    tensor: Tensor
    given: Tensor
    counted: Tensor
    visible: Tensor | None = None
    lacking: int = 0
    additional: int = 0

    def distance(self, reference: Tensor) -> float:
        """The norm of the error. Of several readings that are all wrong, that of a port with a mistake is the nearest:
        a mistake may make one number very wrong, a wrong reading makes all numbers wrong."""
        error = self.tensor.double() - reference.double()
        return float(error[self.counted].nan_to_num(nan=math.inf).norm())

    @property
    def wrong_keys(self) -> int:
        """The number of keys in which the mask that scores show is another one than the reference's."""
        return self.lacking + self.additional


def check_leak(stage: Stage, probabilities: Tensor, counted: Tensor, mask: Tensor) -> None:
    """Make probabilities of hidden keys, however small, the stage's error."""
    leaked = torch.where(counted & ~mask[:, None], probabilities.double().abs(), 0.0)
    largest = float(leaked.max())
    if largest > LEAK:
        stage.where = tuple(int(i) for i in torch.unravel_index(leaked.argmax(), leaked.shape))
        stage.value = largest
        stage.expected = 0.0
        stage.diverges = True
    text, _, query, key = stage.where
    stage.masked = not mask[text, query, key]


@dataclass
class Seen:
    """How the tensors of a port that agree were read, for those that diverge in any reading.

    Attributes:
        readings: by which rearrangements they were made to fit, in words.
        layouts: in which other layouts they were.
    """

    readings: set[str] = field(default_factory=set)
    layouts: set[str] = field(default_factory=set)

    def likely(self, ways: list[Fit]) -> list[Fit]:
        """Those of some readings that agreeing tensors have, or else those in the usual order of dimensions."""
        known = [way for way in ways if way.stage.how in self.readings]
        usual = [way for way in ways if not way.stage.how.startswith(REVERSED)]
        for some in (known, usual):
            if some:
                return some
        return ways


def compare_stage(
    target: Target, tensor: Tensor, padding_mask: Tensor | None, seen: Seen
) -> Fit | None:  # fmt: skip
    """The comparison of one tensor, or None if it has no shape that can be brought to the reference's.

    Several rearrangements may fit. If the first one diverges, another one is taken, if it does not. If all diverge,
    other layouts are tried. If these diverge, too, the tensor is read like the others.

    Args:
        target: the reference.
        tensor: the port's.
        padding_mask: bool (B, S), False at padding.
        seen: how the port's tensors before were read. The reading of this tensor is added.
    """
    reference = target.reference
    fitting = list(fits(target.name, tensor, tuple(reference.shape), padding_mask))
    if not fitting:
        return None
    best = target.fit(*fitting[0])
    if best.stage.diverges or best.wrong_keys:
        ways = [target.fit(*way) for way in fitting]
        ways.sort(key=lambda way: (way.wrong_keys, way.stage.diverges, way.distance(reference)))
        best = ways[0]
    if not best.stage.diverges:
        seen.readings.add(best.stage.how)
        return best
    ways = seen.likely(ways)
    known = None
    for way in ways:
        for layout, other in in_other_layouts(target.name, way.tensor, target.head_dim):
            changed = target.fit(way.stage.how, other, way.given)
            if not changed.stage.diverges:
                way.stage.equal_after = layout
                seen.readings.add(way.stage.how)
                seen.layouts.add(layout)
                return replace(changed, stage=way.stage)
            if known is None and layout in seen.layouts:
                changed.stage.how = joined(way.stage.how, layout)
                known = changed
    if known is not None:
        return known
    return ways[0]


def compare_stages(
    port: Trace, targets: Mapping[str, Target], padding_mask: Tensor | None
) -> tuple[dict[str, Fit], list[str]]:  # fmt: skip
    """The comparisons of all tensors of a port, and of masks that its scores show; and what has another shape."""
    found: dict[str, Fit] = {}
    misshapen: list[str] = []
    seen = Seen()
    for name in order(targets.keys() & port.keys()):
        target = targets[name]
        fit = compare_stage(target, port[name], padding_mask, seen)
        if fit is None:
            sizes, expected = list(port[name].shape), list(target.reference.shape)
            misshapen.append(f"{name} is {sizes}, the reference {expected}")
            continue
        mask = targets.get(name.replace("probabilities", "mask"))
        if name.endswith(".probabilities") and mask is not None:
            check_leak(fit.stage, fit.tensor, target.counted, mask.reference.bool())
        found[name] = fit
    for name, visible in masks_to_compare(found):
        found[name] = targets[name].fit("read from the scores", visible, torch.ones_like(visible))
    return found, misshapen


def masks_to_compare(found: Mapping[str, Fit]) -> list[tuple[str, Tensor]]:
    """The names of masks that scores show and that are wrong, and these masks.

    Scores may be computed for more keys than those that are visible, and have marks for some of the others only, as
    blocks have. So keys that are visible in addition prove nothing if the next stage is right.
    """
    names = order(found)
    wrong = []
    for place, name in enumerate(names):
        visible = found[name].visible
        mask = name.replace("scores", "mask")
        if visible is None or found[name].wrong_keys == 0:
            continue
        if mask in found and found[mask].stage.diverges:
            continue
        later = [found[other].stage for other in names[place + 1 :]]
        next_is_right = bool(later) and later[0].judged and not later[0].diverges
        if not next_is_right or found[name].lacking:
            wrong.append((mask, visible))
    return wrong


def compare(
    port: Trace, reference: Trace, noise: Trace, padding_mask: Tensor | None = None,
    relative: Mapping[str, float] | None = None, margin: float = MARGIN,
    types: Mapping[str, torch.dtype] | None = None,
) -> Report:  # fmt: skip
    """Compare traces stage by stage, in the order of computing.

    Args:
        port: the port's tensors, under the names of `reference.trace.POINTS`.
        reference: the same in float64.
        noise: what `measure_noise` returns for the type of `computed_in`; may be empty.
        padding_mask: bool (B, S), False at padding, which is not compared.
        relative: where there is no noise, a right port's largest error over the largest number.
        margin: how many floors of noise an error may be.
        types: the port's type at each stage, for the report; None: that of the noise.
    """
    if relative is None:
        relative = {}
    if types is None:
        types = {name: tensor.dtype for name, tensor in noise.items()}
    masks = {name: tensor.bool() for name, tensor in reference.items() if name.endswith(".mask")}
    targets = {}
    for name in reference:
        counted = counts(name, reference[name].shape, masks, padding_mask)
        dtype = str(types.get(name, "")).removeprefix("torch.")
        mask = None
        if name.endswith(".scores"):
            mask = masks.get(name.replace("scores", "mask"))
        targets[name] = Target(
            name, reference[name], noise.get(name), relative.get(name, math.nan), counted, margin, dtype,
            head_dim(reference), mask,
        )  # fmt: skip
    found, misshapen = compare_stages(port, targets, padding_mask)

    stages = [found[name].stage for name in order(found)]
    missing = [name for name in order(reference) if name not in port and not name.startswith("input.")]
    unknown = sorted(name for name in port if name not in reference and not name.startswith("input."))
    wrong = next((stage for stage in stages if stage.diverges and not stage.equal_after), None)
    judged = any(stage.judged for stage in stages)
    agrees = judged and wrong is None and not misshapen
    first = None
    if wrong is not None:
        first = wrong.name
    sentence = summary(stages, misshapen, wrong)
    fitted = {name: (found[name].tensor, found[name].counted) for name in order(found)}
    return Report(stages, missing, unknown, misshapen, first, agrees, sentence, fitted=fitted)


def head_dim(reference: Trace) -> int:
    """D, from the queries of a layer; 0 if the reference has none."""
    for name, tensor in reference.items():
        if name.startswith("layers.") and name.endswith(".attention.q"):
            return tensor.shape[-1]
    return 0


def summary(stages: Sequence[Stage], misshapen: Sequence[str], wrong: Stage | None) -> str:
    """The result in a sentence or two."""
    if not stages and misshapen:
        return "nothing to compare: no tensor has the shape that it has in the reference"
    if not stages:
        return "nothing to compare: no tensor has a name of the reference"
    begin = ""
    if len(misshapen) > len(stages) or (misshapen and wrong is None):
        total = len(misshapen) + len(stages)
        begin = f"{len(misshapen)} of {total} stages cannot be compared: {misshapen[0]}. "
    if wrong is not None:
        return f"{begin}{wrong.name} diverges first. {wrong.words()}"

    parts = []
    judged = sum(stage.judged for stage in stages)
    if judged == 1:
        parts.append("1 stage agrees")
    elif judged:
        parts.append(f"{judged} stages agree")
    layouts = [stage.equal_after for stage in stages if stage.equal_after]
    if layouts:
        parts.append(f"{len(layouts)} of them after {' or '.join(sorted(set(layouts)))}")
    if judged < len(stages):
        parts.append(f"{len(stages) - judged} cannot be judged: the noise of their type is not known")
    return begin + ", ".join(parts)
